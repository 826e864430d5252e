"""What the model takes for the kernels of a layout is what the launches do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from apack_compile.cache import Policy, SideStore
from apack_compile.codec import CodeRef, Layout, TransformLayout
from apack_compile.codec.evicting import evicting
from apack_compile.codec.kinds import TEXT, VISUAL
from apack_compile.codec.modal import modal
from apack_compile.codec.tiered import TIERS, layout_of
from apack_compile.cost import H100, PackedSide, launches
from apack_compile.cost.live import first_coded, side_of
from apack_compile.cost.parts import parts_of
from apack_compile.cost.steps import splits_of
from apack_compile.cost.symbols import BATCH, CODED, FIRST, value_of
from apack_compile.kernels.triton import coded, launch, launch_list
from apack_compile.kernels.triton.plan import Config, default_config, make_plan
from apack_compile.kernels.triton.rows import counted_planes

from ..helpers import hand_code

KEYS = TransformLayout(2, 64, 1, 16, 32, 16, 0)
VALUES = replace(KEYS, gain=1)
TURNED = replace(KEYS, rotary=64)
TIERED = layout_of((2, 64, 1), (16, 32, 16), True, TIERS)
KEPT = replace(KEYS, exact=50), replace(VALUES, exact=20)

PAIRS: dict[str, tuple[Layout, Layout]] = {
    "none": (KEYS, VALUES),
    "turned": (TURNED, VALUES),
    "tiers": (KEYS, TIERED),
    "kept": KEPT,
    "kept values": (TURNED, KEPT[1]),
    "evicted": (evicting(KEYS, 10), evicting(VALUES, 10)),
    "evicted keys": (evicting(TURNED, 4), VALUES),
    "tiers, evicted": (evicting(KEYS, 10), evicting(TIERED, 10)),
    "tiers, kept": (KEPT[0], replace(TIERED, exact=20)),
    "kinds": (modal(KEYS, KEYS), modal(VALUES, replace(VALUES, r8=32))),
    "all by kind": (
        modal(evicting(KEPT[0], 10), KEPT[0]),
        modal(evicting(VALUES, 10), TIERED),
    ),
    "turned kinds": (modal(TURNED, TURNED), modal(VALUES, VALUES)),
}
OF_INDUCTOR = {"table", "lengths", "together"}


def stores(name: str, tokens: int = 300) -> list[SideStore]:
    """Both sides of a layer of two sequences, half of whose tokens are visual."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, tokens, 64).to(torch.bfloat16)
    importance = torch.rand(2, tokens)
    refs = [CodeRef(hand_code(layout)) for layout in PAIRS[name]]
    policy, visual = Policy(), importance < 0.5
    return [SideStore.encode(x, ref, policy, None, importance, visual) for ref in refs]


@pytest.mark.parametrize("name", PAIRS)
def test_layouts_are_taken_apart_as_by_the_launches(name: str) -> None:
    key, value = PAIRS[name]
    sides = [PackedSide(layout, Policy(), torch.bfloat16) for layout in (key, value)]
    parts = zip(*(parts_of(side) for side in sides), strict=True)
    pairs = [(a.plain, b.plain) for a, b in coded.pairs(key, value)]
    assert [tuple(p.layout for p in pair) for pair in parts] == pairs
    for layout in (key, value):
        ends = {(low, min(high, len(layout.shares))) for low, high in layout.plane_levels}
        counted = counted_planes(layout)
        assert {(c.first + i, c.last) for c in counted for i in range(c.planes)} <= ends
        assert len(counted) == (len(layout.by_kind) if layout.shares else 0)
        assert all(code.plain.shares == () and not code.plain.kept for code in layout.by_kind)


@pytest.mark.parametrize("name", PAIRS)
def test_the_model_has_the_launches_that_a_step_makes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of the kernels, in order; nothing is run."""
    made: list[str] = []

    class Recorder:
        def __init__(self, fn: Any) -> None:
            self.name = getattr(fn, "fn", fn).__name__.removesuffix("_kernel")

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **constants: made.append(self.name)

    for module in (coded, launch, launch_list):
        monkeypatch.setattr(module, "kernel", Recorder)
    k, v = stores(name)
    q, lengths = torch.randn(2, 4, 1, 64).to(torch.bfloat16), torch.tensor([k.coded, k.recent])
    args = ([*store.tensors(), *store.ref.code.params] for store in (k, v))
    specs = (layout.spec for layout in PAIRS[name])
    launch.attend_packed(q, None, *args, lengths, 0.125, *specs)
    found = [x.name for x in launches(side_of(k), side_of(v), 4, 1, H100)]
    assert [x for x in found if x not in OF_INDUCTOR] == made


@pytest.mark.parametrize("name", PAIRS)
def test_rows_and_bytes_of_parts_are_those_of_stores(name: str) -> None:
    for store in stores(name):
        for later in (0, 96):
            if later:
                for _ in range(later):
                    store.extend(torch.randn(2, 2, 1, 64).to(torch.bfloat16))
            values = {CODED: store.coded, FIRST: first_coded(store)}
            parts = parts_of(side_of(store))
            rows = [value_of(part.rows, values) for part in parts]
            layout = store.ref.layout
            held: list[float] = [store.rows[0] if layout.evicts else store.coded]
            if layout.plane_kinds:
                held = [store.rows[layout.plane_kinds.index(kind)] for kind in (TEXT, VISUAL)]
            assert rows == pytest.approx(held, abs=1 + later / 32)


def test_bits_in_tiers_are_all_bytes_of_a_row_but_gains_and_levels() -> None:
    for layout in (TIERED, evicting(TIERED, 10)):
        (part,) = parts_of(PackedSide(layout, Policy(), torch.bfloat16))
        codes = part.layout.payload_fields(torch.bfloat16)[0][0]
        tiers = TIERED.token_bytes(torch.bfloat16) - 2 - 1
        assert float(part.spread) == codes + 1 + tiers
        assert part.token == codes + 2 + 1 and part.planes == 4


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("rows", [64, 5000, 32768])
def test_programs_over_slots_leave_the_splits_of_the_launch(
    batch: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "multiprocessors", lambda _: H100.multiprocessors)
    key, value = PAIRS["evicted"]
    specs = key.plain.spec, value.plain.spec
    config: Config = default_config(*specs, 28)
    plan = make_plan(*specs, 28, 1, (0, 0), 96, config, True)
    want = launch.count_splits(batch, rows, plan, config, torch.device("cpu"), 3)
    values = {BATCH: batch, CODED: rows}
    assert value_of(splits_of(plan, config, H100, CODED, 3), values) == want
