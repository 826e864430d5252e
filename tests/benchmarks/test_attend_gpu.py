"""What the benchmark of packed attention says of the cost model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apack_compile.cost import H100, H200, Device

attend_gpu = pytest.importorskip("benchmarks.attend_gpu")

RESULTS = Path(attend_gpu.__file__).parent / "results"


@pytest.mark.parametrize(("device", "short"), [(H100, "h100"), (H200, "later-h200")])
def test_predictions_beside_measurements_are_within_25_percent(device: Device, short: str) -> None:
    report = json.loads((RESULTS / f"attend-{short}.json").read_text())
    cases = attend_gpu.CASES | attend_gpu.SWEEP
    assert report["device"] == device.name and report["cases"].keys() <= cases.keys()
    for name, row in report["cases"].items():
        for kind in row.keys() & {"8 bit", "mixed"}:
            predicted = attend_gpu.predicted_ms(cases[name], kind == "mixed", report["device"])
            assert abs(predicted / row[kind]["ms"] - 1) < 0.25, (name, kind)


def test_nothing_is_predicted_of_a_gpu_that_was_not_measured() -> None:
    assert attend_gpu.predicted_ms(attend_gpu.CASES["B8 28/4 S32768"], False, "NVIDIA A100") is None
