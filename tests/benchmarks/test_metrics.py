from __future__ import annotations

import math

import pytest
import torch

from benchmarks.quality.metrics import (
    agreement,
    bootstrap,
    first_difference,
    kl_divergence,
    share,
    surprise,
)


def test_kl_is_that_of_its_definition() -> None:
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    q = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert float(kl_divergence(p.log(), q.log())) == pytest.approx(expected)
    assert float(kl_divergence(p.log(), p.log())) == 0
    expected = 0.25 * math.log(0.5) + 0.5 * math.log(2)  # the other way round
    assert float(kl_divergence(q.log(), p.log())) == pytest.approx(expected)


def test_agreement_counts_equal_predictions() -> None:
    full = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.2, 0.8]]).log()
    coded = torch.tensor([[0.4, 0.6], [0.1, 0.9], [0.3, 0.7]]).log()
    assert agreement(full, coded).tolist() == [1, 0, 1]


def test_surprise_is_of_the_tokens_that_came() -> None:
    predictions = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]], dtype=torch.float64).log()
    got = surprise(predictions, torch.tensor([0, 1, 0]))
    assert got.exp().tolist() == pytest.approx([2, 4])  # row 2 predicts what nobody knows


def test_first_difference() -> None:
    tokens = torch.tensor([3, 1, 4, 1])
    assert first_difference(tokens, tokens) == 4
    assert first_difference(torch.tensor([3, 1, 5, 2]), tokens) == 2
    assert first_difference(torch.tensor([0, 1, 4, 1]), tokens) == 0


def test_the_interval_holds_the_mean_about_95_times_of_100() -> None:
    torch.manual_seed(1)
    hits = 0
    for seed in range(200):
        figure = bootstrap(torch.randn(24, dtype=torch.float64), seed)
        hits += figure.low <= 0 <= figure.high
    assert 180 <= hits <= 198  # percentile intervals of 24 values are a little narrow


def test_the_interval_is_around_the_mean_and_the_same_each_time() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    figure = bootstrap(values)
    assert figure.mean == 4 and 1 <= figure.low < 4 < figure.high <= 9
    assert bootstrap(values) == figure
    many = torch.randn(24)
    assert bootstrap(many) != bootstrap(many, seed=1)
    assert bootstrap(torch.tensor([2.5])) == bootstrap(torch.tensor([2.5, 2.5]))


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="values is empty"):
        bootstrap(torch.tensor([]))


@pytest.mark.parametrize(("count", "width"), [(1, 0.975), (24, 0.1425), (200, 0.0183)])
def test_shares_that_are_all_alike_have_an_interval(count: int, width: float) -> None:
    """Bug: the interval of all or none right had no width, as if it were certain."""
    none, all_of_them = share(torch.zeros(count)), share(torch.ones(count))
    assert (none.mean, none.low) == (0, 0) and none.high == pytest.approx(width, abs=5e-5)
    assert (all_of_them.mean, all_of_them.high) == (1, 1)
    assert all_of_them.low == pytest.approx(1 - width, abs=5e-5)
    assert (1 - none.high) ** count == pytest.approx(0.025)  # so likely is none of so many
    same = share(torch.zeros(count), least=-1)
    assert (same.low, same.high) == (-none.high, none.high)
    worse = share(-torch.ones(count), least=-1)
    assert worse.low == -1 and worse.high == pytest.approx(width - 1, abs=5e-5)


def test_other_shares_have_the_interval_of_the_bootstrap() -> None:
    mixed = torch.tensor([0.0, 0.5, 1.0, 1.0])
    assert share(mixed) == bootstrap(mixed)
    opposite = torch.tensor([-1.0, 1.0])  # their mean is 0, and yet they are not alike
    assert share(opposite, least=-1) == bootstrap(opposite)
    assert bootstrap(torch.ones(24)).low == 1  # of what is no share, nothing is assumed
    half = torch.full((4,), 0.5)
    assert share(half) == bootstrap(half)


@pytest.mark.parametrize("values", [[-0.5, 0.5], [0.5, 1.5]])
def test_what_is_no_share_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="accepted is 0 to 1"):
        share(torch.tensor(values))
