from __future__ import annotations

import pytest
import torch

from benchmarks.quality.rivals.base import RECENT, SINKS, Size, between
from benchmarks.quality.rivals.dense import Dense

from .cases import layer


def test_only_tokens_between_sinks_and_recent_ones_are_coded() -> None:
    x = layer(SINKS + RECENT + 5).k
    coded = between(x, torch.zeros_like)
    assert torch.equal(coded[:, :, :SINKS], x[:, :, :SINKS])
    assert torch.equal(coded[:, :, -RECENT:], x[:, :, -RECENT:])
    assert coded[:, :, SINKS:-RECENT].abs().sum() == 0


def test_a_context_without_tokens_between_is_refused() -> None:
    with pytest.raises(ValueError, match="accepted is more than 68"):
        between(layer(SINKS + RECENT).k, torch.zeros_like)


def test_the_dense_cache_stays_as_it_is_and_has_ratio_1() -> None:
    given = layer(100)
    k, v = Dense().code(given)
    assert torch.equal(k, given.k) and torch.equal(v, given.v)
    assert Dense().ratio(Size(32, 2, 16)) == 1
    assert Dense().whole_ratio(100, 2, 16) == 1
