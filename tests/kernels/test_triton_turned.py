"""Keys coded before their rotary embedding by the Triton kernels, against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from apack_compile.cache import Policy
from apack_compile.codec import Code, TransformLayout
from apack_compile.kernels.triton import launch, turned
from apack_compile.kernels.triton.calls import INTERPRETED
from apack_compile.kernels.triton.plan import Config, shared_bytes, supported

from ..helpers import encoded
from .test_triton_attend import (
    DEVICE,
    LAYOUTS,
    MIXES,
    POOLED,
    POOLLESS,
    RUNS,
    attend,
    case,
    check,
    every,
    transform,
)


def keys(rotary: int = 64, interleaved: int = 0, **sizes: Any) -> TransformLayout:
    return replace(transform(**sizes), rotary=rotary, interleaved=interleaved)


@pytest.mark.parametrize(("runs", "gain"), every(MIXES, (RUNS[0], 0), (RUNS[2], 1), (RUNS[4], 1)))
def test_every_mix_of_bits(runs: tuple[int, int, int], gain: int) -> None:
    check(case(keys(runs=runs, gain=gain), transform(runs=runs, gain=1), batch=1))


PAIRS = [
    (dim, rotary, interleaved)
    for dim, rotary in (
        (64, 64), (64, 32), (80, 80), (80, 32), (96, 96), (96, 24), (128, 128), (128, 64),
        (256, 256), (256, 64), (37, 16), (24, 2),
    )
    for interleaved in (0, 1)
]  # fmt: skip


@pytest.mark.parametrize(("dim", "rotary", "interleaved"), every(
    PAIRS, (64, 64, 1), (80, 32, 0), (80, 32, 1), (37, 16, 0), (37, 16, 1), (128, 128, 0)
))  # fmt: skip
def test_every_way_to_pair_channels(dim: int, rotary: int, interleaved: int) -> None:
    """An odd channel is left where 37 have 16 rotated ones."""
    check(case(keys(rotary, interleaved, dim=dim), transform(), batch=1, length=40))


GROUPS = [(1, 1, 3), (1, 2, 7), (1, 4, 1), (2, 1, 1), (2, 4, 3), (4, 1, 7), (4, 4, 1)]


@pytest.mark.parametrize(("k_groups", "v_groups", "repeat"), every(GROUPS, (1, 2, 7), (4, 1, 7)))
def test_heads_share_groups_of_codes(k_groups: int, v_groups: int, repeat: int) -> None:
    k = keys(16, heads=4, dim=32, groups=k_groups)
    check(case(k, transform(4, 32, v_groups, gain=1), batch=1, repeat=repeat, length=40))


QUERIES = [(queries, repeat) for queries in (1, 2, 4, 16) for repeat in (1, 7)]


@pytest.mark.parametrize(("queries", "repeat"), every(QUERIES, (4, 7)))
def test_queries(queries: int, repeat: int) -> None:
    given = case(keys(), transform(gain=1), queries=queries, repeat=repeat, batch=1, length=40)
    check(given)


@pytest.mark.parametrize("tokens", every([16, 32, 64, 128], 32))
@pytest.mark.parametrize("dtype", every([torch.float16, torch.bfloat16], torch.bfloat16))
def test_dtypes_and_tiles(dtype: torch.dtype, tokens: int) -> None:
    given = case(keys(gain=1), transform(gain=1), dtype=dtype)
    check(given, Config(tokens=tokens, rows=16, least=16))


@pytest.mark.parametrize("length", every([4, 8, 23, 24, 100, 1000], 4, 24))
def test_lengths(length: int) -> None:
    given = case(keys(), transform(gain=1), batch=1, length=length)
    check(given, Config(tokens=16, rows=16, fill=8))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_positions_count_from_the_first_visible_token(kind: str) -> None:
    """Sequences padded on the left by 0 and by 17 tokens: slot 0 of the pool says where they begin.

    The mask differs by query and head as well.
    """
    visible = torch.arange(50) >= torch.tensor([[0], [17]])
    given = case(keys(), transform(gain=1), queries=3, visible=visible)
    assert given["k"][2][:, 0].tolist() == [0, 17]
    seen = visible[:, None, None] & (torch.rand(2, 4, 3, 50) < 0.7)
    given["mask"] = seen
    if kind == "float":
        given["mask"] = torch.randn(seen.shape).masked_fill(~seen, float("-inf"))
    check(given)


def test_rows_that_see_nothing_are_zero() -> None:
    given = case(keys(), transform(gain=1), queries=3)
    given["mask"] = torch.ones(2, 1, 3, 50, dtype=torch.bool)
    given["mask"][0, :, 1] = False
    out = check(given)
    assert not out[0, :, 1].any() and out[0, :, 0].all()


@pytest.mark.parametrize("gain", [0, 1])
@pytest.mark.parametrize("softcap", every([1.0, 50.0], 1.0))
def test_capped_scores(gain: int, softcap: float) -> None:
    """The mean is part of what is capped."""
    given = case(keys(gain=gain), transform(gain=1), queries=2, batch=1) | {"softcap": softcap}
    given["q"] = given["q"] * 4
    check(given)


def test_sinks_among_the_scores() -> None:
    given = case(keys(), transform(gain=1), queries=3, repeat=3, dtype=torch.bfloat16)
    given["sinks"] = torch.linspace(-4, 6, 6).bfloat16()
    given["sinks"][1] = 300.0
    check(given)


ONE_SINK = Policy(sinks=1, extra=0, window=7, block=16, chunk=16)


@pytest.mark.parametrize("policies", [(POOLED, POOLLESS), (ONE_SINK, POOLLESS), (ONE_SINK, POOLED)])
@pytest.mark.parametrize("gain", [0, 1])
def test_pools_differ(policies: tuple[Policy, Policy], gain: int) -> None:
    """Keys have a slot at least: it says where a sequence begins."""
    check(case(keys(gain=gain), transform(gain=1), batch=1, policies=policies))


@pytest.mark.parametrize("value", every(["exact", "codes"], "exact"))
@pytest.mark.parametrize("side", ["k", "v"])
def test_a_pooled_token_counts_once_and_its_code_does_not(side: str, value: str) -> None:
    """Pools of different tokens, whose codes are far from them: a coded key meets a pooled value.

    With exact values no number of ``table`` is read.
    """
    given = case(keys(), LAYOUTS["exact"][1] if value == "exact" else transform(gain=1))
    at = len(given["codes"]["kv".index(side)].layout.payload_fields(torch.float16))
    pool, positions = given[side][at], given[side][at + 1]
    positions[:, -1] = torch.tensor([30, 11])
    pool[:, :, -1] = torch.randn_like(pool[:, :, -1]) * 3
    check(given)


def test_a_token_that_is_not_a_number_spoils_its_row_alone() -> None:
    given = case(keys(), transform(gain=1))
    x = torch.randn(2, 2, 50, 64).half()
    x[0, 1, 5, 2] = float("nan")
    given["k"], _ = encoded(x, given["codes"][0], POOLED)
    out = attend(**given)
    assert out[0, 2:].isnan().all() and out[0, :2].isfinite().all() and out[1].isfinite().all()


def test_far_positions() -> None:
    """Angles of 30,000 radians: slot 0 of the pool has a number far before the first token."""
    given = case(keys(), transform(gain=1), batch=1, policies=(ONE_SINK, POOLED))
    given["k"][2][:, 0] = -30_000
    check(given)


@pytest.mark.parametrize("power", every([-60, -20, -13, 13, 20, 60], -60, 13))
def test_keys_of_another_scale(power: int) -> None:
    """Keys, their basis and their mean are brought into the range of float16, queries as well."""
    given = case(keys(gain=1), transform(gain=1), dtype=torch.bfloat16, length=40)
    expected = attend(**given)
    key, value = given["codes"]
    scale = 2.0**power
    mean, analysis, synthesis, units, *rest = key.params
    whiten, metric, scales, spans, waves = rest
    params = (
        mean * scale, analysis, synthesis, units * torch.tensor([1.0, scale])[:, None, None],
        whiten, metric, scales, spans / torch.tensor([scale, 1.0]), waves,
    )  # fmt: skip
    tensors = given["k"][: -len(params)]
    for i in (2, 4):  # pool, ring
        tensors[i] = tensors[i] * scale
    given |= {"k": [*tensors, *params], "codes": (Code(key.layout, params), value)}
    given["q"] = given["q"] / scale
    assert torch.equal(attend(**given), expected)


def test_results_repeat_to_the_bit() -> None:
    given = case(keys(), transform(gain=1), batch=1)
    assert torch.equal(attend(**given), attend(**given))


def test_what_the_kernels_take() -> None:
    q = torch.empty(1, 4, 1, 64, dtype=torch.float16)
    key, value = keys(), transform(gain=1)
    assert supported(key) and launch.takes(q, key.spec, value.spec)
    assert not launch.takes(q, key.spec, replace(value, rotary=64).spec)  # values never turn
    assert not launch.takes(q.float(), key.spec, value.spec)
    assert not supported(keys(runs=(16, 24, 16)))


def test_a_basis_that_shared_memory_does_not_hold_is_left_to_plain_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """227 KB of an H100, 99 KB of a consumer GPU."""
    q, value = torch.empty(1, 4, 1, 128, dtype=torch.float16, device=DEVICE), transform().spec
    large = keys(256, dim=256, runs=(96, 128, 128))
    real = keys(128, heads=4, dim=128, runs=(32, 128, 128))
    for layout, rows in ((large, 128 + 128 + 128), (real, 32 + 128 + 128)):
        assert shared_bytes(layout) == rows * layout.dim * 2 + (104 << 10)
        for memory, fits in ((227, rows < 300), (99, False)):
            monkeypatch.setattr(launch, "shared_memory", lambda _, size=memory: size << 10)
            assert launch.takes(q, layout.spec, value) == fits
            assert launch.takes(q, replace(layout, rotary=0).spec, value)


@triton.jit
def _waves(
    positions, waves, out, COUNT: tl.constexpr, PAIRS: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    n, pair = tl.arange(0, COUNT), tl.arange(0, PAIRS)
    frequency, phase = tl.load(waves + pair), tl.load(waves + PAIRS + pair)
    cos, sin = turned.waves_at(tl.load(positions + n), frequency, phase, ASM)
    where = out + n[:, None] * PAIRS + pair[None, :]
    tl.store(where, cos)
    tl.store(where + COUNT * PAIRS, sin)


def far_waves() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions up to 131,072, waves of 16 pairs, and the angles in float32 ``[64, 16]``."""
    positions = torch.cat([torch.arange(32), 131_073 - torch.arange(32) ** 3]).float()
    waves = torch.stack([1e4 ** -(torch.arange(16) / 16), torch.arange(16) - 8.0])
    return positions, waves, positions[:, None] * waves[0] + waves[1]


def test_angles_are_those_of_the_coding_side() -> None:
    """Cosine and sine within 1e-6 of those of the angle as PyTorch rounds it."""
    positions, waves, angles = far_waves()
    out = torch.empty(2, 64, 16, device=DEVICE)
    _waves[(1,)](positions.to(DEVICE), waves.to(DEVICE), out, 64, 16, not INTERPRETED)
    expected = torch.stack([angles.double().cos(), angles.double().sin()])
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=1e-6)


def test_the_assembler_takes_whole_turns_from_angles() -> None:
    """What it says, instruction by instruction, but for the sine: angles within half a turn."""
    positions, waves, angles = far_waves()
    values = {
        "$2": positions.numpy()[:, None], "$3": waves[0].numpy(), "$4": waves[1].numpy(),
    }  # fmt: skip

    def value(name: str) -> np.ndarray:
        if name.startswith("0f"):
            return np.uint32(int(name[2:], 16)).view(np.float32)
        return values[name]

    text = turned.ASM_WAVE.value.strip("{} ")
    lines = [line.strip() for line in text.split(";") if line.strip()][1:]
    for line in lines:
        name, target, *inputs = line.replace(",", "").split()
        if name == "mul.rn.f32":
            result = value(inputs[0]) * value(inputs[1])
        elif name == "add.rn.f32":
            result = value(inputs[0]) + value(inputs[1])
        elif name == "cvt.rni.f32.f32":
            result = np.rint(value(inputs[0]))
        elif name == "fma.rn.f32":
            a, b, c = (np.float64(value(i)) for i in inputs)
            result = np.float32(a * b + c)
        elif name == "cos.approx.ftz.f32":
            result = np.cos(np.float64(value(inputs[0])))
        else:
            assert name == "sin.approx.ftz.f32"
            result = np.sin(np.float64(value(inputs[0])))
        values[target] = result
    assert np.abs(values["a"]).max() < 3.1416
    np.testing.assert_allclose(values["$0"], angles.double().cos().numpy(), rtol=0, atol=4e-7)
    np.testing.assert_allclose(values["$1"], angles.double().sin().numpy(), rtol=0, atol=4e-7)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels")
@pytest.mark.parametrize("config", [
    None, Config(tokens=32, stages=2), Config(tokens=64, stages=2, least=16),
    Config(tokens=128, warps=8, stages=2, least=16),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiles_of_real_size(config: Config | None, dtype: torch.dtype) -> None:
    k = keys(128, heads=4, dim=128, runs=(32, 128, 128))
    v = transform(4, 128, 1, (32, 128, 96), 1)
    check(case(k, v, batch=2, repeat=7, length=700, dtype=dtype), config)
