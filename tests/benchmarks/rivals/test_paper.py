from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.quality.rivals.base import RECENT, SINKS, Size
from benchmarks.quality.rivals.factors import Factors
from benchmarks.quality.rivals.paper import Paper
from benchmarks.quality.rivals.truncated_svd import TruncatedSvd, rotate

from .cases import MIDDLE, assert_exact_outside, layer

TOKENS = SINKS + RECENT + 100


def test_with_all_tokens_alike_it_is_the_truncated_svd() -> None:
    given = layer(TOKENS)
    rank = TruncatedSvd(4).rank(32)
    k, v = Paper(Factors(rank), Factors(rank)).code(given)
    expected_k, expected_v = TruncatedSvd(4).code(given)
    torch.testing.assert_close(k, expected_k, rtol=0, atol=5e-3)  # of factors of 16 bits
    torch.testing.assert_close(v, expected_v, rtol=0, atol=5e-3)
    assert Paper(Factors(rank), Factors(rank)).coded_bytes(Size(100, 2, 16)) == TruncatedSvd(
        4
    ).coded_bytes(Size(100, 2, 16))


def test_a_quarter_of_the_tokens_by_attention_has_all_components_of_values() -> None:
    """The average of attention over heads decides, by its definition."""
    given = layer(TOKENS)
    low = Factors(8, 2)
    k, v = Paper(Factors(8), low, 0.25).code(given)
    whole_k, whole_v = Paper(Factors(8), Factors(8)).code(given)
    _, few = Paper(None, Factors(2)).code(given)
    assert torch.equal(k, whole_k)
    for b in range(2):
        mean = given.received[b].mean(0)[MIDDLE]
        best = set(mean.topk(25).indices.tolist())
        for t in range(100):
            expected = whole_v if t in best else few
            at = SINKS + t
            torch.testing.assert_close(v[b, :, at], expected[b, :, at], rtol=0, atol=5e-3)
    assert_exact_outside(v, given.v)


def test_keys_are_factored_without_their_rotation() -> None:
    given = layer(TOKENS)
    raw = torch.ones_like(given.k) * torch.linspace(1, 2, TOKENS, dtype=torch.float64)[:, None]
    k = rotate(raw, given.cos, given.sin)
    coded, v = Paper(Factors(1), None).code(replace(given, k=k))
    torch.testing.assert_close(coded, k, rtol=0, atol=5e-3)
    assert torch.equal(v, given.v)
    assert_exact_outside(coded, k)


def test_eviction_drops_the_others() -> None:
    given = layer(TOKENS)
    k, v = Paper(None, None, 0.25, evict=True).code(given)
    for b in range(2):
        best = given.received[b].mean(0)[MIDDLE].topk(25).indices.sort().values
        wanted = torch.cat([torch.arange(SINKS), SINKS + best, torch.arange(TOKENS)[-RECENT:]])
        torch.testing.assert_close(k[b], given.k[b][:, wanted])  # rotated back and forth
        assert torch.equal(v[b], given.v[b][:, wanted])
    coded, _ = Paper(Factors(8), None, 0.25, evict=True).code(given)
    whole, _ = Paper(Factors(8), None).code(given)
    torch.testing.assert_close(coded[0, 0], whole[0, 0][[
        *range(SINKS),
        *(SINKS + given.received[0].mean(0)[MIDDLE].topk(25).indices.sort().values).tolist(),
        *range(TOKENS - RECENT, TOKENS),
    ]])  # fmt: skip


def test_bytes() -> None:
    size = Size(1000, 3, 64)
    factors = Factors(48, 12)
    keys = 2 * 48 * (1000 + 192)
    assert Paper(Factors(48), factors, 0.25).coded_bytes(size) == keys + 2 * (
        250 * 48 + 750 * 12 + 48 * 192
    )
    assert Paper(Factors(48), None).coded_bytes(size) == keys + 2 * 1000 * 192
    dropped = Paper(Factors(48), Factors(48), 0.25, evict=True)
    assert dropped.coded_bytes(size) == 2 * 2 * 48 * (250 + 192)
