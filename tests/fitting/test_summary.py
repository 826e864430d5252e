from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apack_compile.fitting.summary import FitSummary, LayerSummary, spearman
from apack_compile.runtime.calibrate import Trial

from ..helpers import few


def test_rank_correlation_of_the_textbook() -> None:
    """Hours of television and IQ of ten people: rho = -29/165."""
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    assert spearman(iq, hours) == pytest.approx(-29 / 165)


@few
@given(st.lists(st.integers(-100, 100), min_size=2, max_size=12, unique=True), st.randoms())
def test_only_ranks_count(values: list[int], random: Random) -> None:
    others = random.sample(values, len(values))
    rho = spearman(values, others)
    assert -1 - 1e-9 <= rho <= 1 + 1e-9
    assert spearman([v**3 for v in values], [2 * v + 1 for v in others]) == pytest.approx(rho)
    assert spearman(others, values) == pytest.approx(rho)
    assert spearman(values, [-v for v in others]) == pytest.approx(-rho)
    assert spearman(values, values) == pytest.approx(1)


def test_equal_values_share_their_ranks() -> None:
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9**0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


def layer(k: float, v: float, cost: float | None) -> LayerSummary:
    trials = None if cost is None else (Trial(cost, 2 * cost), Trial(cost, -cost))
    return LayerSummary((k, v), trials)


def summary(*layers: LayerSummary, reasons: tuple[str, ...] = ()) -> FitSummary:
    return FitSummary(layers, 2, 900, 1.26, reasons, (Path("/a/b"),))


def test_a_summary_says_what_was_fitted() -> None:
    text = str(summary(layer(0.1, 0.2, 1.0), layer(0.3, 0.2, 2.0), reasons=("because",)))
    assert text.splitlines() == [
        "attentionpack: codes of 2 layers fitted on 900 tokens of 2 batches in 1.3 s",
        "  coding error of keys, relative: mean 0.2000, largest 0.3000",
        "  coding error of values, relative: mean 0.2000, largest 0.2000",
        "  sensitivity of layers, predicted and measured: rank correlation 1.00 for keys, -1.00 "
        "for values",
        "  because",
        "  saved to /a/b",
    ]


def test_without_measurements_there_is_no_correlation() -> None:
    assert summary(layer(0.1, 0.2, None), layer(0.1, 0.2, None)).rank_correlation is None
    assert summary(layer(0.1, 0.2, 1.0)).rank_correlation is None
    assert "correlation" not in str(summary(layer(0.1, 0.2, 1.0)))
