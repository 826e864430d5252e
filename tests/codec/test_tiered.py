from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apack_compile.codec import TieredLayout, TransformLayout
from apack_compile.codec.fit import Evidence, fit_transform
from apack_compile.codec.layout import PARTS, tiers_of
from apack_compile.codec.moments import Moments
from apack_compile.codec.quantiser import SHRINK, tailed_quantiser
from apack_compile.codec.recipe import Recipe
from apack_compile.codec.sensitivity import Sensitivity
from apack_compile.codec.spectrum import spreading_rotation
from apack_compile.codec.tiered import MASS, TIERS, felt_error, layout_of, mean_bits

from ..helpers import few

Params = list[Tensor]

EXACT = 1e-6
"""Of the size of a token: units and scales of a code are float32."""


def code(
    heads: int, groups: int, runs: tuple[int, int, int], shares: tuple[int, ...]
) -> tuple[TransformLayout, TransformLayout, Params, Params]:
    """A plain code and one in tiers, of the same orthogonal basis, which float16 can hold."""
    dim = 16
    n = heads // groups * dim
    plain = TransformLayout(heads, dim, groups, *runs, gain=1)
    tiered = layout_of((heads, dim, groups), runs, True, shares)
    basis = spreading_rotation(n).expand(groups, n, n)[..., : plain.rank]
    steps = torch.cat([torch.full((c,), tailed_quantiser(b)[0]).double() for b, c in plain.runs])
    metric = torch.eye(dim, dtype=torch.float64).expand(heads, dim, dim)
    each = steps.expand(groups, -1)
    params = plain.params_of(
        torch.randn(groups, n, dtype=torch.float64) * 0.1, basis / steps,
        basis.mT * steps[:, None], metric, each, each,
    )  # fmt: skip
    return plain, tiered, params, [*params, torch.ones(len(shares) + 1, dtype=torch.float64)]


shapes = st.tuples(
    st.sampled_from([(1, 1), (2, 1), (2, 2), (6, 3)]),
    st.sampled_from([(16, 0, 0), (0, 16, 0), (0, 0, 16), (0, 8, 8), (8, 0, 8)]),
    st.sampled_from([(32,), (32, 20), (30, 20, 10), TIERS]),
)


@given(shape=shapes, batch=st.integers(1, 3), tokens=st.integers(1, 9))
@few
def test_a_token_with_all_planes_is_what_it_is_without_tiers(
    shape: Any, batch: int, tokens: int
) -> None:
    (heads, groups), runs, shares = shape
    plain, tiered, params, mine = code(heads, groups, runs, shares)
    x = torch.randn(batch, heads, tokens, 16, dtype=torch.float64)
    a, b = plain.encode(x, params), tiered.encode(x, mine)
    assert torch.equal(plain.decode(a, params, x.dtype), tiered.decode(b, mine, x.dtype))
    q, p = (
        torch.randn(batch, 2 * heads, 2, 16).double(),
        torch.rand(batch, heads, 2, tokens).double(),
    )
    assert torch.equal(plain.scores(q, a, params), tiered.scores(q, b, mine))
    assert torch.equal(plain.mix(p, a, params), tiered.mix(p, b, mine))


@given(shape=shapes, tokens=st.integers(1, 9))
@few
def test_a_token_without_its_last_bits_is_the_middle_of_what_they_could_be(
    shape: Any, tokens: int
) -> None:
    """Against codes of the plain layout, number by number."""
    (heads, groups), runs, shares = shape
    _, tiered, params, mine = code(heads, groups, runs, shares)
    x = torch.randn(1, heads, tokens, 16, dtype=torch.float64)
    levels = torch.randint(0, len(shares) + 1, (1, tokens), dtype=torch.uint8)
    payload = tiered.encode(x, mine, None, levels)
    got = tiered.decode(payload, mine, x.dtype)
    assert torch.equal(payload[2][..., 0], levels)
    mean, analysis, synthesis, units, whiten = (p.double() for p in params[:5])
    analysis = analysis * units[0][:, None] * params[7][0].double()
    synthesis = synthesis * units[1][..., None]
    grouped = x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)[0]  # [G, T, n]
    y = (grouped - mean[:, None]) @ analysis
    for group in range(groups):
        for token in range(tokens):
            lacking = len(shares) - int(levels[0, token])
            gain = (y[group, token] * whiten[group]).square().mean().sqrt().half().double()
            gain = (gain * SHRINK[lacking]).half().double()
            back = []
            first = 0
            for bits, count in tiered.runs:
                for number in y[group, token, first : first + count].tolist():
                    whole = min(max(int(number // float(gain)) + 2 ** (bits - 1), 0), 2**bits - 1)
                    cell = 2 ** min(lacking, bits)
                    middle = whole // cell * cell + (cell - 1) / 2
                    back.append(float(gain) * (middle + 0.5 - 2 ** (bits - 1)))
                first += count
            want = mean[group] + torch.tensor(back, dtype=torch.float64) @ synthesis[group]
            per = heads // groups
            mine_ = got[0, group * per : (group + 1) * per, token].flatten()
            torch.testing.assert_close(mine_, want, rtol=1e-9, atol=1e-9)


def test_errors_are_judged_as_they_are_and_fall_with_the_level() -> None:
    _, tiered, _, params = code(2, 1, (8, 8, 16), TIERS)
    params[-1] = torch.tensor([4.0, 3.0, 2.0, 1.5, 1.0], dtype=torch.float64)
    x = torch.randn(1, 2, 500, 16, dtype=torch.float64)
    mean = []
    for level in range(5):
        levels = torch.full((1, 500), level, dtype=torch.uint8)
        payload, judged = tiered.encode_and_judge(x, params, None, levels)
        assert judged is not None
        wrong = (tiered.decode(payload, params, x.dtype) - x).square().sum((1, 3))
        assert ((judged.error - wrong).abs() <= EXACT * judged.size).all()
        strain = judged.error / params[-1][level]
        torch.testing.assert_close(judged.strain, strain)
        mean.append(float(wrong.mean()))
    assert mean == sorted(mean, reverse=True)
    assert mean[0] > 2 * mean[4]


def test_bytes_of_a_token_are_those_of_its_rows() -> None:
    layout = layout_of((4, 32, 1), (16, 32, 64), True, TIERS)
    base, gains, levels = 16 * 4 // 8, 2, 1
    planes = [(16 + 32) // 8] * 2 + [(16 + 32 + 64) // 8] * 2
    want = base + gains + levels
    want += sum(share * width for share, width in zip(TIERS, planes, strict=True)) / PARTS
    assert layout.token_bytes(torch.float16) == want


def test_the_budgets_arithmetic() -> None:
    assert sum(share for share, _ in tiers_of(TIERS)) == 1
    assert [lacking for _, lacking in tiers_of(TIERS)] == [4, 3, 2, 1, 0]
    assert mean_bits(8, ()) == 8 and mean_bits(4, (PARTS,) * 2) == 4
    assert mean_bits(2, TIERS) == (6 + 2) / PARTS
    assert felt_error(4, TIERS) < 0.5 * sum(
        share * error
        for (share, _), error in zip(tiers_of(TIERS), [1, 0.363, 0.119, 0.037, 0.02], strict=True)
    ), "few bits go to tokens that few look at"
    assert len(MASS) == len(TIERS) + 1


@pytest.mark.parametrize("sensed", [False, True])
@pytest.mark.parametrize("ratio", [4, 8, 12])
def test_codes_in_tiers_keep_to_the_budget(ratio: float, sensed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    layers = []
    for _ in range(3):
        scale = torch.rand(1, 4, 1, 32, generator=generator) * 3
        x = torch.randn(1, 4, 300, 32, generator=generator) * scale
        metric = torch.eye(32).double().expand(4, 32, 32)
        seen = Sensitivity(metric, metric) if sensed else None
        layers.append(Evidence(Moments.of(x, x, x, None), None, seen))
    codes = fit_transform(layers, (32, 32), Recipe(ratio, tiers=True), 0)
    spent = sum(c.layout.token_bytes(torch.float16) for pair in codes for c in pair)
    assert all(isinstance(v.layout, TieredLayout) for _, v in codes)
    assert not any(k.layout.shares for k, _ in codes)
    budget = 3 * 2 * 2 * 4 * 32 / ratio
    assert 0.8 * budget < spent <= budget
    for _, v in codes:
        expected = v.params[-1]
        assert list(expected) == sorted(expected, reverse=True)
        shares = torch.tensor([share for share, _ in v.layout.tiers])
        torch.testing.assert_close((expected * shares).sum(), torch.tensor(1.0))
