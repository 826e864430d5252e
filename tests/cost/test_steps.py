"""Predicted times beside those measured (benchmarks/results/attend-*.json)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apack_compile.cache import Policy
from apack_compile.codec import Layout, TransformLayout
from apack_compile.codec.evicting import evicting
from apack_compile.codec.fixed import fixed_code
from apack_compile.codec.modal import modal
from apack_compile.codec.spectrum import head_groups
from apack_compile.cost import (
    H100,
    H200,
    Device,
    PackedSide,
    device_named,
    is_predicted,
    launches,
    seconds_of,
)
from apack_compile.cost.steps import splits_of
from apack_compile.cost.symbols import BATCH, CODED, value_of
from apack_compile.kernels.triton.plan import default_config, make_plan

from ..helpers import fitted_ref

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
MEASURED: dict[Device, dict[str, Any]] = {
    device: json.loads((RESULTS / f"attend-{name}.json").read_text())
    for device, name in ((H100, "h100"), (H200, "later-h200"))
}
DIM = 128

FITTED = {(H100, "B1 28/4 S4096", "8 bit"), (H100, "B8 32/32 S8192", "mixed")}
"""The constants are of these."""

CASES = [
    (device, name, kind)
    for device, report in MEASURED.items()
    for name, case in report["cases"].items()
    for kind in ("8 bit", "mixed")
    if kind in case
]
HELD_OUT = [case for case in CASES if case not in FITTED]


def shape_of(name: str) -> tuple[int, int, int, int]:
    """Batch, query heads, KV heads and tokens of a case such as ``B8 28/4 S32768``."""
    batch, heads, tokens = name.split()
    q_heads, kv_heads = heads.split("/")
    return int(batch[1:]), int(q_heads), int(kv_heads), int(tokens[1:])


def sides(name: str, kind: str) -> tuple[PackedSide, PackedSide]:
    """As they were measured: groups of 512 channels, 8 slots and 96 tokens exact."""
    heads = shape_of(name)[2]
    groups = head_groups(heads, DIM)
    size = 2 * heads * DIM // groups // 8
    runs = [(size, 0, 0), (size - 16, 0, 0)]
    if kind == "mixed":
        runs = [(size // 4, size, size), (size // 4, size, size - 32)]
    k, v = (
        PackedSide(TransformLayout(heads, DIM, groups, *r, gain), Policy(extra=4), torch.bfloat16)
        for gain, r in enumerate(runs)
    )
    return k, v


def predicted(device: Device, name: str, kind: str) -> float:
    """Milliseconds."""
    batch, q_heads, _, tokens = shape_of(name)
    return 1e3 * seconds_of(*sides(name, kind), q_heads, device, batch, tokens)


def measured(device: Device, name: str, kind: str) -> float:
    return MEASURED[device]["cases"][name][kind]["ms"]


@pytest.mark.parametrize(("device", "name", "kind"), CASES)
def test_the_codes_are_those_that_were_measured(device: Device, name: str, kind: str) -> None:
    batch, _, _, tokens = shape_of(name)
    each = sum(side.layout.token_bytes(side.dtype) for side in sides(name, kind))
    assert batch * tokens * each == MEASURED[device]["cases"][name][kind]["code_bytes"]


@pytest.mark.parametrize(("device", "name", "kind"), HELD_OUT)
def test_times_that_no_constant_was_fitted_to_are_within_25_percent(
    device: Device, name: str, kind: str
) -> None:
    assert abs(predicted(device, name, kind) / measured(device, name, kind) - 1) < 0.25


def test_all_times_but_two_are_held_out() -> None:
    assert len(CASES) == 9 + 11 and len(HELD_OUT) == 18


def test_the_constants_solve_the_equations_that_they_are_of() -> None:
    """As ``cost/device.py`` says, to three digits."""
    for case in FITTED:
        assert predicted(*case) == pytest.approx(measured(*case), rel=5e-3)
    for device, report in MEASURED.items():
        assert device.bandwidth == report["copy_gb_s"] * 1e9
    assert replace(H200, name=H100.name, bandwidth=H100.bandwidth) == H100


@pytest.mark.parametrize("name", ["B8 28/4 S32768", "B8 32/32 S8192", "B1 28/4 S1024"])
@pytest.mark.parametrize("batch", [1, 3, 8, 70])
@pytest.mark.parametrize("tokens", [1, 64, 65, 5000, 32768])
def test_splits_are_those_of_the_launch(
    name: str, batch: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = pytest.importorskip("apack_compile.kernels.triton.launch")
    monkeypatch.setattr(launch, "multiprocessors", lambda _: H100.multiprocessors)
    k, v = (side.layout.spec for side in sides(name, "mixed"))
    config = default_config(k, v, shape_of(name)[1])
    plan = make_plan(k, v, shape_of(name)[1], 1, (8, 8), 96, config)
    want = launch.count_splits(batch, tokens, plan, config, torch.device("cpu"))
    values = {BATCH: batch, CODED: tokens}
    assert value_of(splits_of(plan, config, H100), values) == want


def test_a_step_is_three_launches_of_batch_and_length() -> None:
    k, v = sides("B8 28/4 S32768", "mixed")
    kernels = launches(k, v, 28, 1, H100)
    assert [kernel.name for kernel in kernels] == ["fold", "attend", "merge"]
    assert kernels[1].moved.free_symbols == {BATCH, CODED}
    nothing = sum(value_of(x.seconds(H100), {BATCH: 1, CODED: 0}) for x in kernels)
    assert 3 * H100.launch < nothing < 4 * H100.launch


def test_a_program_with_one_tile_waits_as_long_however_few_there_are() -> None:
    """So few tokens take what a tile takes, and long contexts whole tiles of each program."""
    k, v = sides("B8 28/4 S32768", "mixed")

    def work(batch: int, tokens: int) -> float:
        return value_of(launches(k, v, 28, 1, H100)[1].work, {BATCH: batch, CODED: tokens})

    assert work(1, 64) == work(1, 4032) == work(8, 31 * 64) > 0
    assert work(8, 31 * 64 + 1) == 2 * work(1, 64)


def test_kernels_that_were_not_measured_are_not_predicted() -> None:
    """Nor what plain operators do."""
    k, v = sides("B8 28/4 S32768", "8 bit")
    assert is_predicted(k, v)
    exact = PackedSide(fixed_code("exact", 4, DIM).layout, Policy(), torch.bfloat16)
    single = PackedSide(v.layout, v.policy, torch.float32)
    assert not any(is_predicted(k, other) for other in (exact, single))

    def with_(side: PackedSide, layout: Layout) -> PackedSide:
        return replace(side, layout=layout)

    tiered = with_(v, fitted_ref(4, DIM, tiers=True).layout)
    assert is_predicted(k, tiered) and not is_predicted(tiered, v)
    dropping, kept = with_(k, evicting(k.layout, 8)), with_(k, replace(k.layout, exact=10))
    for listed in (dropping, kept):
        assert is_predicted(listed, v) and not is_predicted(listed, tiered)
    turned = [with_(side, replace(side.layout, rotary=DIM)) for side in (k, v)]
    assert is_predicted(turned[0], v) and not is_predicted(*turned)
    wide = with_(k, replace(k.layout, rotary=DIM, r8=0, r4=32, r2=1024))
    assert not is_predicted(wide, v), "its basis does not fit into shared memory"
    kinds = [with_(side, modal(side.layout, side.layout)) for side in (k, v)]
    assert is_predicted(*kinds) and not is_predicted(kinds[0], v)


def test_only_a_gpu_that_was_measured_is_known() -> None:
    for device, report in MEASURED.items():
        assert device_named(report["device"]) is device
    assert device_named("NVIDIA H100 PCIe") is None and device_named("NVIDIA A100") is None
