from __future__ import annotations

import pytest

from benchmarks.quality.measure import unit_of
from benchmarks.quality.paper import EQUAL, PAPER, tiered
from benchmarks.quality.rivals.base import RECENT, SINKS, Size


def test_the_papers_settings_are_a_run_of_their_own() -> None:
    assert len(PAPER) == len({m.name for m in PAPER}) == 26
    for method in PAPER:
        assert method.runs == {"paper"} and method.family == "the paper" and not method.ours
        assert unit_of(method, 2048) == method.name  # each by whichever process has time


@pytest.mark.parametrize(("ratio", "reached"), [(8, 8.15), (4, 4.07)])
def test_the_own_setting_reaches_the_ratio_at_2048_tokens(ratio: int, reached: float) -> None:
    rank, rest = EQUAL[ratio]
    assert rest == rank // 4
    got = tiered(rank, rest).ratio(Size(2048 - SINKS - RECENT, 3, 64))
    assert got == pytest.approx(reached, abs=0.005)
    assert tiered(rank + 1, (rank + 1) // 4).ratio(Size(1980, 3, 64)) < reached
