from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apack_compile.codec import TransformLayout
from apack_compile.codec.rotation import rotate
from apack_compile.codec.spectrum import spreading_rotation
from apack_compile.codec.transform import GAIN_DTYPE, LEAST_GAIN
from apack_compile.kernels.reference import decode_reference

from ..helpers import few, hand_code, random_payload


@st.composite
def layouts(draw: st.DrawFn) -> TransformLayout:
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    r8 = draw(st.integers(0, 5))
    r4 = 2 * draw(st.integers(0, 5))
    r2 = 4 * draw(st.integers(0 if r8 + r4 else 1, 5))
    return TransformLayout(
        heads, draw(st.sampled_from([1, 3, 8])), groups, r8, r4, r2, draw(st.integers(0, 2))
    )


@st.composite
def positional_layouts(draw: st.DrawFn) -> TransformLayout:
    layout = draw(layouts())
    dim = draw(st.sampled_from([2, 6, 8]))
    rotary = draw(st.sampled_from([r for r in (2, 4, 8) if r <= dim]))
    return replace(layout, dim=dim, rotary=rotary, interleaved=draw(st.integers(0, 1)))


@given(layout=layouts(), batch=st.integers(1, 3), tokens=st.integers(0, 5), seed=st.integers(0, 99))
@few
def test_payload_has_the_shapes_and_bytes_that_the_layout_says(
    layout: TransformLayout, batch: int, tokens: int, seed: int
) -> None:
    code = hand_code(layout, seed)
    x = torch.randn(batch, layout.heads, tokens, layout.dim)
    payload = layout.encode(x, code.params)
    fields = layout.payload_fields(x.dtype)
    assert len(code.params) == layout.param_count
    assert [(p.shape, p.dtype) for p in payload] == [
        ((batch, tokens, width), dtype) for width, dtype in fields
    ]
    assert sum(p.nbytes for p in payload) == batch * tokens * layout.token_bytes(x.dtype)
    decoded = layout.decode(payload, code.params, torch.bfloat16)
    assert decoded.shape == x.shape
    assert decoded.dtype == torch.bfloat16


@given(layout=layouts(), batch=st.integers(1, 2), tokens=st.integers(0, 4), seed=st.integers(0, 99))
@few
def test_decoding_agrees_with_decoding_number_by_number(
    layout: TransformLayout, batch: int, tokens: int, seed: int
) -> None:
    code = hand_code(layout, seed)
    payload = random_payload(layout, batch, tokens, torch.float32)
    expected = decode_reference(layout, payload, code.params)
    # float64 rounding of sums of at most 45 terms of size at most 2**8
    torch.testing.assert_close(
        layout.decode(payload, code.params, torch.float64), expected, rtol=0, atol=1e-10
    )


@given(
    layout=positional_layouts(), tokens=st.integers(0, 5), repeats=st.integers(1, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
@few
def test_scores_of_keys_coded_before_their_rotation(
    layout: TransformLayout, tokens: int, repeats: int, seed: int
) -> None:
    code = hand_code(layout, seed)
    unrotated = replace(layout, rotary=0, interleaved=0)
    positions = torch.randint(0, 5000, (2, tokens))
    payload = random_payload(layout, 2, tokens, torch.float32)
    plain = unrotated.decode(payload, code.params, torch.float64)
    x = rotate(plain, positions, code.params[-1], bool(layout.interleaved))
    # float64 rounding; numbers are up to some 1e4
    close = {"rtol": 1e-10, "atol": 1e-8}
    torch.testing.assert_close(
        layout.decode(payload, code.params, torch.float64, positions), x, **close
    )
    q = torch.randn(2, layout.heads * repeats, 3, layout.dim, dtype=torch.float64)
    torch.testing.assert_close(
        layout.scores(q, payload, code.params, positions),
        q @ x.repeat_interleave(repeats, 1).mT,
        **close,
    )
    again = layout.encode(x, code.params, positions)
    before = unrotated.encode(plain, code.params)
    for mine, theirs in zip(again, before, strict=True):
        assert int((mine != theirs).sum()) <= 1  # a number on the border of two codes


@given(
    layout=layouts(), batch=st.integers(1, 2), tokens=st.integers(0, 5),
    repeats=st.integers(1, 3), queries=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
@few
def test_absorbed_scores_and_mix_are_those_of_the_decoded_tokens(
    layout: TransformLayout, batch: int, tokens: int, repeats: int, queries: int, seed: int
) -> None:
    code = hand_code(layout, seed)
    payload = random_payload(layout, batch, tokens, torch.float32)
    x = layout.decode(payload, code.params, torch.float64).repeat_interleave(repeats, 1)
    heads = layout.heads * repeats
    q = torch.randn(batch, heads, queries, layout.dim, dtype=torch.float64)
    p = torch.rand(batch, heads, queries, tokens, dtype=torch.float64)
    # float64 rounding; numbers are up to some 1e4
    close = {"rtol": 1e-10, "atol": 1e-8}
    torch.testing.assert_close(layout.scores(q, payload, code.params), q @ x.mT, **close)
    torch.testing.assert_close(layout.mix(p, payload, code.params), p @ x, **close)


def identity(runs: tuple[int, int, int], gain: int = 0) -> tuple[TransformLayout, list[Tensor]]:
    """One head whose components are its channels, in steps of 1."""
    n = sum(runs)
    layout, one, every = TransformLayout(1, n, 1, *runs, gain), torch.ones(1, n), torch.eye(n)[None]
    return layout, layout.params_of(0 * one, every, every, every, one, one if gain else None)


def test_components_are_rounded_to_the_middle_of_their_step() -> None:
    layout, params = identity((2, 2, 4))
    x = torch.tensor([0.0, -0.2, 3.9, -4.0, 0.5, 1.0, -1.5, -0.1])
    payload = layout.encode(x.view(1, 1, 1, 8), params)
    decoded = layout.decode(payload, params, torch.float32).flatten()
    assert decoded.tolist() == [0.5, -0.5, 3.5, -3.5, 0.5, 1.5, -1.5, -0.5]


@pytest.mark.parametrize(
    ("runs", "largest"), [((4, 0, 0), 127.5), ((0, 4, 0), 7.5), ((0, 0, 4), 1.5)]
)
def test_numbers_beyond_the_last_level_are_clamped(
    runs: tuple[int, int, int], largest: float
) -> None:
    layout, params = identity(runs)
    x = torch.tensor([1e9, -1e9, largest + 5, -largest - 5]).view(1, 1, 1, 4)
    decoded = layout.decode(layout.encode(x, params), params, torch.float32).flatten()
    assert decoded.tolist() == [largest, -largest, largest, -largest]


def test_groups_are_coded_apart_from_each_other() -> None:
    layout = TransformLayout(6, 3, 3, 4, 4, 4, 1)
    code = hand_code(layout)
    x = torch.randn(2, 6, 5, 3)
    changed = x.clone()
    changed[:, 2:4] += 1.0  # the second group
    before = layout.decode(layout.encode(x, code.params), code.params, x.dtype)
    after = layout.decode(layout.encode(changed, code.params), code.params, x.dtype)
    assert torch.equal(before[:, [0, 1, 4, 5]], after[:, [0, 1, 4, 5]])
    assert not torch.equal(before[:, 2:4], after[:, 2:4])


def test_each_group_of_a_joint_code_is_the_code_of_its_heads_alone() -> None:
    layout = TransformLayout(4, 3, 2, 2, 4, 8, 0)
    code = hand_code(layout)
    alone = TransformLayout(2, 3, 1, 2, 4, 8, 0)
    x = torch.randn(2, 4, 5, 3)
    whole = layout.decode(layout.encode(x, code.params), code.params, x.dtype)
    for group in range(2):
        mean, analysis, synthesis, units, *rest = code.params
        params = [p[group : group + 1] for p in (mean, analysis, synthesis)]
        params += [units[:, group : group + 1], *rest]
        part = x[:, 2 * group : 2 * group + 2]
        mine = alone.decode(alone.encode(part, params), params, x.dtype)
        # float32 rounding of another matrix product
        torch.testing.assert_close(mine, whole[:, 2 * group : 2 * group + 2], rtol=0, atol=1e-3)


def test_a_gain_makes_the_code_indifferent_to_the_size_of_a_token() -> None:
    layout, params = identity((0, 8, 0), gain=1)
    x = torch.randn(1, 1, 1, 8)
    for size in (2.0**-6, 1.0, 2.0**8):  # powers of two: exact in the 16-bit gain
        payload = layout.encode(x * size, params)
        decoded = layout.decode(payload, params, torch.float32)
        torch.testing.assert_close(
            decoded, layout.decode(layout.encode(x, params), params, torch.float32) * size
        )
        assert payload[1].dtype == GAIN_DTYPE


def test_a_token_equal_to_the_mean_has_a_finite_gain() -> None:
    layout, params = identity((8, 0, 0), gain=1)
    payload = layout.encode(torch.zeros(1, 1, 1, 8), params)
    assert payload[1].item() == pytest.approx(LEAST_GAIN, rel=1e-2)  # 16-bit rounding
    assert layout.decode(payload, params, torch.float32).abs().max() < 1e-4


def test_empty_runs_are_not_stored() -> None:
    layout = TransformLayout(2, 8, 1, 0, 6, 0, 0)
    assert layout.runs == ((4, 6),)
    assert layout.rank == 6
    assert layout.token_bytes(torch.float32) == 3


@pytest.mark.parametrize("gain", [0, 1])
@pytest.mark.parametrize("pre_rope", [False, True])
def test_errors_are_judged_in_the_metric(gain: int, pre_rope: bool) -> None:
    """With a basis that is orthonormal in the metric, as fits make them, and that float16 holds."""
    heads, dim, rank = 2, 8, 12
    generator = torch.Generator().manual_seed(gain)
    sizes = 2.0 ** torch.randint(-3, 4, (heads, dim), generator=generator).double()
    root = torch.diag_embed(sizes)
    wide = torch.block_diag(*root)
    basis = spreading_rotation(16)
    steps = torch.rand(1, rank, generator=generator, dtype=torch.float64) + 0.1
    mean = torch.randn(1, 16, generator=generator, dtype=torch.float64)
    layout = TransformLayout(heads, dim, 1, 4, 4, 4, gain, dim * pre_rope)
    params = layout.params_of(
        mean, (wide @ basis)[None, :, :rank] / steps[:, None],
        (basis.mT @ wide.inverse())[None, :rank] * steps[..., None],
        root, steps, torch.ones(1, rank) if gain else None,
    )  # fmt: skip
    params += [torch.full((2, dim), 0.3)] * pre_rope
    x = torch.randn(2, heads, 5, dim, generator=generator, dtype=torch.float64)
    positions = torch.arange(5)[None]
    payload, judged = layout.encode_and_judge(x, params, positions)
    assert judged is not None
    back = layout.decode(payload, params, torch.float64, positions)
    if pre_rope:
        x, back = (rotate(t, positions, -params[-1], False) for t in (x, back))
    for found, d in zip(judged[:2], (x - back, x - mean.view(heads, 1, dim)), strict=True):
        wanted = (d @ root).square().sum((1, 3))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # units are float32
    for mine, theirs in zip(payload, layout.encode(x, params, positions), strict=True):
        assert torch.equal(mine, theirs) or pre_rope
