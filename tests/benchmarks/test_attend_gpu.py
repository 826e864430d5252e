"""What the benchmark of packed attention says without a GPU."""

from __future__ import annotations

import pytest

from apack_compile.cost import H100

attend_gpu = pytest.importorskip("benchmarks.attend_gpu")


@pytest.mark.parametrize(
    ("name", "mixed", "microseconds"),
    [
        ("B8 32/8 S32768", False, 75.6),
        ("B8 32/8 S32768", True, 149.6),
        ("B8 32/32 S8192", False, 85.3),
        ("B8 32/32 S8192", True, 140.9),
    ],
)
def test_predictions_of_todays_groups_are_within_25_percent(
    name: str, mixed: bool, microseconds: float
) -> None:
    """Measured with groups of 512 channels: docs/performance.md, *Packed attention alone*."""
    predicted = attend_gpu.predicted_ms(attend_gpu.CASES[name], mixed, H100.name)
    assert abs(1e3 * predicted / microseconds - 1) < 0.25


def test_nothing_is_predicted_of_a_gpu_that_was_not_measured() -> None:
    assert attend_gpu.predicted_ms(attend_gpu.CASES["B8 28/4 S32768"], False, "NVIDIA H200") is None
