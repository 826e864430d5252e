"""The Triton kernels against the float64 oracle: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

pytest.importorskip("triton", reason="Triton is not installed")

from apack_compile.cache import Policy
from apack_compile.codec import Code, ExactLayout, Layout, TransformLayout
from apack_compile.kernels.reference import attend_reference, unpack_reference
from apack_compile.kernels.triton import launch
from apack_compile.kernels.triton.calls import INTERPRETED
from apack_compile.kernels.triton.launch import attend_packed
from apack_compile.kernels.triton.plan import MERGE, Config, default_config, make_plan

from ..helpers import encoded, hand_code, pair_waves, poison

DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

POOLED = Policy(sinks=3, extra=2, window=7, block=16, chunk=16)
POOLLESS = Policy(sinks=0, extra=0, window=7, block=16, chunk=16)
SMALL = Config(tokens=16, rows=16)


def every(cases: list[Any], *few: Any) -> list[Any]:
    """All cases on a GPU; a few under the interpreter, which takes a second for each."""
    return cases if DEVICE == "cuda" else list(few)


def code_of(layout: Layout, seed: int = 0) -> Code:
    """A code whose decoded tokens are of the size of real ones."""
    code = hand_code(layout, seed)
    if isinstance(layout, ExactLayout):
        return code
    mean, analysis, synthesis, units, *rest = code.params
    size = (analysis.shape[1] * layout.rank) ** 0.5
    factors = torch.tensor([20.0, 1.0])[:, None, None] / size
    if isinstance(layout, TransformLayout) and layout.positional:
        rest[-1] = pair_waves(layout)
    return Code(layout, (mean, analysis, synthesis, units * factors, *rest))


def case(
    k: Layout, v: Layout, *, batch: int = 2, repeat: int = 2, queries: int = 1, length: int = 50,
    policies: tuple[Policy, Policy] = (POOLED, POOLED), dtype: torch.dtype = torch.float16,
    visible: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    codes = code_of(k), code_of(v, 1)
    sides = []
    for code, policy in zip(codes, policies, strict=True):
        x = torch.randn(batch, code.layout.heads, length, code.layout.dim).to(dtype)
        if policy.extra and code.layout.kind != "exact":
            x[0, :, length // 2] *= 4  # far from the others
        side, lengths = encoded(x, code, policy, visible)
        sides.append(side)
    q = torch.randn(batch, k.heads * repeat, queries, k.dim).to(dtype)
    return {"q": q, "mask": None, "k": sides[0], "v": sides[1], "lengths": lengths, "codes": codes}


def attend(
    q: Tensor, mask: Tensor | None, k: list[Tensor], v: list[Tensor], lengths: Tensor,
    codes: tuple[Code, Code], softcap: float = 0.0, sinks: Tensor | None = None,
    config: Config = SMALL,
) -> Tensor:  # fmt: skip
    specs = [code.layout.spec for code in codes]
    bias = None
    if mask is not None:
        ring = k[len(codes[0].layout.payload_fields(q.dtype)) + 2].shape[2]
        bias = torch.ops.apack.score_bias(mask, lengths, k[0].shape[1], ring, q.dtype).to(DEVICE)
    k, v = [t.to(DEVICE) for t in k], [t.to(DEVICE) for t in v]
    q, lengths = q.to(DEVICE), lengths.to(DEVICE)
    sinks = None if sinks is None else sinks.to(DEVICE)
    out = attend_packed(q, bias, k, v, lengths, 0.125, *specs, softcap, sinks, config)
    return out.cpu()


def check(given: dict[str, Any], config: Config = SMALL) -> Tensor:
    """Relative error within the rounding of the dtype, stale slots poisoned."""
    length = int(given["lengths"].sum())
    dense = [
        unpack_reference(given[side], given["lengths"], length, code.layout.spec)
        for side, code in zip("kv", given["codes"], strict=True)
    ]
    expected = attend_reference(
        given["q"], *dense, given["mask"], 0.125, given.get("softcap", 0.0), given.get("sinks")
    )
    for side, code in zip("kv", given["codes"], strict=True):
        given[side] = poison(given[side], given["lengths"], code.layout)
    out = attend(**given, config=config)
    assert out.dtype == given["q"].dtype and out.shape == expected.shape
    error = (out.double() - expected).norm() / expected.norm()
    assert error < torch.finfo(out.dtype).eps, f"relative error {error:.2e}"
    return out


def transform(
    heads: int = 2, dim: int = 64, groups: int = 1, runs: tuple[int, int, int] = (16, 32, 16),
    gain: int = 0,
) -> TransformLayout:  # fmt: skip
    return TransformLayout(heads, dim, groups, *runs, gain)


RUNS = [(32, 0, 0), (0, 32, 0), (0, 0, 64), (16, 32, 16), (48, 80, 16)]


MIXES = [(runs, gain) for runs in RUNS for gain in (0, 1)]


@pytest.mark.parametrize(("runs", "gain"), every(MIXES, (RUNS[1], 0), (RUNS[2], 1), (RUNS[4], 1)))
def test_every_mix_of_bits(runs: tuple[int, int, int], gain: int) -> None:
    check(case(transform(runs=runs, gain=gain), transform(runs=runs, gain=gain), batch=1))


@pytest.mark.parametrize("tokens", every([16, 32, 64, 128], 32))
@pytest.mark.parametrize("dtype", every([torch.float16, torch.bfloat16], torch.bfloat16))
def test_dtypes_and_tiles(dtype: torch.dtype, tokens: int) -> None:
    check(case(transform(), transform(gain=1), dtype=dtype), Config(tokens=tokens, rows=16))


def test_exact_codes_want_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: one more launch in each step, for values that have no codes."""
    given = case(ExactLayout(2, 64), ExactLayout(2, 64))
    monkeypatch.setattr(launch, "MOST_STACKED", None)  # of the table, which cannot be made
    check(given)


DIMS = [(64, 64), (80, 96), (128, 64), (256, 256)]


@pytest.mark.parametrize("dims", every(DIMS, (80, 96)))
def test_head_dims(dims: tuple[int, int]) -> None:
    check(case(transform(dim=dims[0]), transform(dim=dims[1], gain=1), batch=1, length=40))


def test_more_components_than_the_merge_holds() -> None:
    v = transform(4, 128, 1, (64, 192, 128), 1)
    assert 1 < v.rank / MERGE.components < 2
    check(case(transform(4, 128), v, batch=1, repeat=1, length=40))


GROUPS = [(1, 2), (2, 4), (4, 1), (4, 4)]


@pytest.mark.parametrize(("k_groups", "v_groups"), every(GROUPS, (1, 2)))
def test_keys_and_values_may_be_grouped_differently(k_groups: int, v_groups: int) -> None:
    k, v = transform(4, 16, k_groups, (16, 16, 16)), transform(4, 16, v_groups, (16, 16, 0), 1)
    check(case(k, v, batch=1, repeat=1, length=40))


@pytest.mark.parametrize("exact", ["k", "v", "kv"])
def test_exact_codes(exact: str) -> None:
    layouts = [ExactLayout(2, 32) if side in exact else transform(2, 32) for side in "kv"]
    policies = tuple(POOLLESS if side in exact else POOLED for side in "kv")
    check(case(*layouts, policies=policies))


QUERIES = [(queries, repeat) for queries in (1, 2, 5, 16) for repeat in (1, 3, 7)]


@pytest.mark.parametrize(("queries", "repeat"), every(QUERIES, (1, 7), (16, 1)))
def test_queries_and_heads(queries: int, repeat: int) -> None:
    check(case(transform(), transform(gain=1), queries=queries, repeat=repeat, batch=1, length=40))


@pytest.mark.parametrize("length", every([1, 6, 7, 8, 23, 24, 100, 1000], 1, 8, 24))
def test_lengths(length: int) -> None:
    given = case(transform(), transform(gain=1), batch=1, length=length)
    check(given, Config(tokens=16, rows=16, fill=8))


SHAPES = [(2, 1, 1, 50), (1, 1, 3, 50), (2, 4, 3, 50), (2, 1, 3, 1)]
MASKS = [(shape, kind) for shape in SHAPES for kind in ("bool", "float")]


@pytest.mark.parametrize(("shape", "kind"), every(MASKS, (SHAPES[0], "bool"), (SHAPES[2], "float")))
def test_masks(shape: tuple[int, ...], kind: str) -> None:
    given = case(transform(), transform(gain=1), queries=3)
    hidden = torch.rand(shape) < 0.4
    given["mask"] = (
        ~hidden if kind == "bool" else torch.randn(shape).masked_fill(hidden, float("-inf"))
    )
    check(given)


def test_rows_that_see_nothing_are_zero() -> None:
    given = case(transform(), transform(gain=1), queries=3)
    given["mask"] = torch.ones(2, 1, 3, 50, dtype=torch.bool)
    given["mask"][0, :, 1] = False
    out = check(given)
    assert not out[0, :, 1].any() and out[0, :, 0].all()


LAYOUTS = {
    "codes": (transform(), transform(gain=1)),
    "gains of keys": (transform(gain=1), transform()),
    "groups": (transform(4, 32, 2), transform(4, 32, 4, gain=1)),
    "exact": (ExactLayout(2, 64), ExactLayout(2, 64)),
}


@pytest.mark.parametrize("layouts", every(list(LAYOUTS), "codes", "gains of keys", "exact"))
@pytest.mark.parametrize("softcap", every([1.0, 50.0], 1.0))
def test_capped_scores(layouts: str, softcap: float) -> None:
    """Codes whose mean is far from 0: it is part of what is capped."""
    given = case(*LAYOUTS[layouts], queries=2, batch=1) | {"softcap": softcap}
    given["q"] = given["q"] * 4
    check(given)


@pytest.mark.parametrize("layouts", every(list(LAYOUTS), "codes", "groups"))
@pytest.mark.parametrize("dtype", every([torch.float32, torch.bfloat16], torch.bfloat16))
def test_sinks_among_the_scores(layouts: str, dtype: torch.dtype) -> None:
    k, v = LAYOUTS[layouts]
    given = case(k, v, queries=3, repeat=3)
    given["sinks"] = torch.linspace(-4, 6, k.heads * 3).to(dtype)
    given["sinks"][1] = 300.0
    check(given)


def test_a_sink_of_rows_that_see_nothing_gives_nothing() -> None:
    given = case(transform(), transform(gain=1), queries=3, batch=1)
    given["sinks"] = torch.tensor([-5.0, 0.0, 5.0, float("-inf")])
    given["mask"] = torch.ones(1, 1, 3, 50, dtype=torch.bool)
    given["mask"][:, :, 1] = False
    out = check(given)
    assert not out[:, :, 1].any() and out[:, :, 0].all()


@pytest.mark.parametrize("policies", [(POOLED, POOLLESS), (POOLLESS, POOLED)])
def test_one_side_may_have_a_pool_alone(policies: tuple[Policy, Policy]) -> None:
    check(case(transform(), transform(gain=1), batch=1, policies=policies))


@pytest.mark.parametrize("side", ["k", "v"])
def test_a_pooled_token_counts_once_and_its_code_does_not(side: str) -> None:
    """Pools of keys and values that hold different tokens, whose codes are far from them."""
    given = case(transform(), transform(gain=1))
    at = len(given["codes"]["kv".index(side)].layout.payload_fields(torch.float16))
    pool, positions = given[side][at], given[side][at + 1]
    positions[:, -1] = torch.tensor([30, 11])
    pool[:, :, -1] = torch.randn_like(pool[:, :, -1]) * 3
    check(given)


def test_a_token_that_is_not_a_number_spoils_its_row_alone() -> None:
    given = case(transform(), transform(gain=1))
    x = torch.randn(2, 2, 50, 64).half()
    x[0, 1, 5, 2] = float("nan")
    given["k"], _ = encoded(x, given["codes"][0], POOLED)
    out = attend(**given)
    assert out[0, 2:].isnan().all() and out[0, :2].isfinite().all() and out[1].isfinite().all()


@pytest.mark.parametrize("apart", [1, 2])
def test_ring_and_pool_share_programs_or_do_not(
    apart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "programs_apart", lambda *_: apart)
    check(case(transform(), transform(gain=1), batch=1))


BESIDE = [
    ({"heads": 4, "groups": 1}, {"repeat": 8}, 1, None),  # more pieces than splits, blocks of rows
    ({"heads": 4, "groups": 2}, {"repeat": 2}, 2, None),
    ({"heads": 2, "groups": 1}, {"repeat": 20}, 2, None),  # blocks of a head
    ({"heads": 2, "groups": 1}, {"repeat": 2}, 3, POOLLESS),
    ({"heads": 2, "groups": 1}, {"repeat": 2, "length": 9}, 3, None),  # nothing is coded
]


@pytest.mark.parametrize(("layout", "sizes", "splits", "policy"), BESIDE)
def test_programs_over_codes_do_ring_and_pool_where_they_are_many(
    layout: dict[str, int], sizes: dict[str, Any], splits: int, policy: Policy | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(launch, "exact_beside", lambda *_: 1)
    monkeypatch.setattr(launch, "count_splits", lambda *_: splits)
    policies = (policy or POOLED,) * 2
    given = case(transform(**layout), transform(**layout, gain=1), policies=policies, **sizes)
    check(given, replace(SMALL, beside=1))


def test_programs_are_counted_without_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that are symbols stay symbols, and give what numbers do."""
    monkeypatch.setattr(launch, "multiprocessors", lambda _: 132)
    spec, shapes = transform(4, 128, 1).spec, ShapeEnv()
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    fake = FakeTensorMode(shape_env=shapes).from_tensor(
        torch.empty(8, 32768), symbolic_context=sizes
    )
    config = default_config(spec, spec, 28)
    plan = make_plan(spec, spec, 28, 1, (8, 8), 96, config)
    device = torch.device(DEVICE)
    counts = (launch.exact_beside, launch.count_splits)
    found = [count(*fake.shape, plan, config, device) for count in counts]
    assert not any(isinstance(n, int) for n in found) and not shapes.guards
    assert [int(n) for n in found] == [count(8, 32768, plan, config, device) for count in counts]


def test_programs_over_codes_have_tiles_enough_to_do_ring_and_pool() -> None:
    mixed = transform(4, 128, 1).spec
    config = default_config(mixed, mixed, 28)
    plan = make_plan(mixed, mixed, 28, 1, (8, 8), 96, config)
    device = torch.device(DEVICE)
    slots = launch.multiprocessors(device) * config.fill
    enough = slots * config.beside * config.tokens // plan.blocks
    assert launch.exact_beside(1, enough, plan, config, device) == 1
    assert launch.exact_beside(1, enough - config.tokens, plan, config, device) == 0
    assert launch.exact_beside(2, enough // 2, plan, config, device) == 1
    wide = transform(4, 128, 1, (128, 0, 0)).spec
    never = default_config(wide, wide, 28)
    assert launch.exact_beside(64, enough, plan, never, device) == 0


def test_programs_are_apart_where_there_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(transform(heads=4).spec, transform(heads=4).spec, 28, 1, (4, 4), 96, SMALL)
    device = torch.device(DEVICE)
    monkeypatch.setattr(launch, "multiprocessors", lambda _: 132)
    few = 132 // 4 // 4
    assert launch.programs_apart(few, plan, device) == 2
    assert launch.programs_apart(few + 1, plan, device) == 1
    alone = make_plan(transform().spec, transform().spec, 28, 1, (0, 0), 96, SMALL)
    assert launch.programs_apart(1, alone, device) == 1


def test_pools_of_long_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than a mask has bits: pooled tokens are not read as codes as well."""
    monkeypatch.setattr(launch, "count_splits", lambda *_: 1)
    given = case(transform(), transform(gain=1), length=2400)
    held = torch.tensor([1200, 2300])
    for side in "kv":
        pool, positions = given[side][1 + (side == "v") :][:2]  # behind codes and gains
        positions[:, 3:] = held
        pool[:, :, 3:] = 8 * torch.randn_like(pool[:, :, 3:])
    given["v"][1][:, held] = 100.0  # the gains of what is not to be read
    check(given)


def test_the_work_is_cut_by_rows() -> None:
    """Two warps hold the sums of 16 rows, and codes of 4 and 2 bits have no more in a program."""
    wide, mixed = transform(4, 128, 1, (128, 0, 0)).spec, transform(4, 128, 1).spec
    assert default_config(wide, wide, 16).warps == 2
    assert default_config(wide, wide, 17).warps == 4
    assert default_config(wide, mixed, 28).warps == default_config(mixed, wide, 28).warps == 2
    exact = ExactLayout(4, 128).spec
    assert default_config(exact, wide, 4) == default_config(wide, exact, 4) == Config()


def test_results_repeat_to_the_bit() -> None:
    given = case(transform(), transform(gain=1), batch=1)
    assert torch.equal(attend(**given), attend(**given))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels")
@pytest.mark.parametrize("config", [
    Config(), Config(rows=16, warps=2, stages=2, fill=4, stacked=32),
    Config(stages=2, beside=1, fill=1),
    Config(tokens=128, warps=8, stages=2),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiles_of_real_size(config: Config, dtype: torch.dtype) -> None:
    k = transform(4, 128, 1, (64, 128, 128))
    v = transform(4, 128, 1, (32, 144, 96), 1)
    check(case(k, v, batch=1, repeat=7, length=300, dtype=dtype), config)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels")
@pytest.mark.parametrize("exact", ["k", "v", "kv"])
def test_exact_codes_in_tiles_of_real_size(exact: str) -> None:
    """Bug: a mask of queries and one of tokens shared a name; their shapes agree in small tiles."""
    layouts = [ExactLayout(4, 128) if side in exact else transform(4, 128) for side in "kv"]
    policies = tuple(POOLLESS if side in exact else POOLED for side in "kv")
    check(case(*layouts, repeat=7, length=300, policies=policies), Config())
