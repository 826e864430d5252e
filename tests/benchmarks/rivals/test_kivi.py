from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality.rivals.base import Size
from benchmarks.quality.rivals.kivi import GROUP, Kivi, by_channel, by_token, quantise

from ...helpers import few
from .cases import assert_exact_outside, layer


def test_numbers_lie_on_equally_spaced_levels_between_the_extremes() -> None:
    x = torch.tensor([[0.0, 1.0, 1.4, 1.6, 3.0]], dtype=torch.float64)
    assert quantise(x, 2, 1).tolist() == [[0.0, 1.0, 1.0, 2.0, 3.0]]


@given(st.integers(1, 8), st.integers(2, 40), st.floats(0.01, 100))
@few
def test_the_error_is_at_most_half_a_step(bits: int, count: int, spread: float) -> None:
    x = spread * torch.randn(3, count, dtype=torch.float64)
    step = (x.amax(1) - x.amin(1)) / (2**bits - 1)
    error = (quantise(x, bits, 1) - x).abs().amax(1)
    assert (error <= 0.5 * step * (1 + 1e-9)).all()
    assert all(len(set(row.tolist())) <= 2**bits for row in quantise(x, bits, 1))


def test_equal_numbers_stay_what_they_are() -> None:
    x = torch.full((2, 8), -3.25, dtype=torch.float64)
    assert torch.equal(quantise(x, 2, 1), x)


def test_keys_share_a_scale_along_tokens_and_values_along_channels() -> None:
    x = torch.randn(1, 1, GROUP, 8, dtype=torch.float64)
    large = x.clone()
    large[..., 3] *= 1000  # one channel: others must not notice in keys
    others = [c for c in range(8) if c != 3]
    assert torch.equal(by_channel(large, 2)[..., others], by_channel(x, 2)[..., others])
    long = x.clone()
    long[:, :, 5] *= 1000  # one token: others must not notice in values
    rest = [t for t in range(GROUP) if t != 5]
    assert torch.equal(by_token(long, 2)[:, :, rest], by_token(x, 2)[:, :, rest])
    assert not torch.equal(by_channel(long, 2)[:, :, rest], by_channel(x, 2)[:, :, rest])


def test_keys_behind_the_last_whole_group_are_exact() -> None:
    k = torch.randn(1, 1, GROUP + 7, 8, dtype=torch.float64)
    coded = by_channel(k, 2)
    assert torch.equal(coded[:, :, GROUP:], k[:, :, GROUP:])
    assert not torch.equal(coded[:, :, :GROUP], k[:, :, :GROUP])


def test_sinks_and_recent_tokens_are_exact() -> None:
    given_layer = layer(200)
    k, v = Kivi(2).code(given_layer)
    assert_exact_outside(k, given_layer.k)
    assert_exact_outside(v, given_layer.v)


@pytest.mark.parametrize(("bits", "token_bytes"), [(2, 2 * 192 / 4), (4, 2 * 192 / 2)])
def test_bytes(bits: int, token_bytes: float) -> None:
    # 3 heads of 64: of 64 tokens, 192 groups of keys and 192 of values, 4 bytes each
    expected = 64 * token_bytes + 2 * 192 * 4
    assert Kivi(bits).coded_bytes(Size(64, 3, 64)) == expected
    # 10 more tokens: exact keys, coded values
    rest = 10 * (192 * 2 + token_bytes / 2 + 3 * 4)
    assert Kivi(bits).coded_bytes(Size(74, 3, 64)) == expected + rest
