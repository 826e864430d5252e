from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.quality.rivals import attention
from benchmarks.quality.rivals.base import RECENT

from .cases import layer


def defined(queries: Tensor, k: Tensor) -> Tensor:
    """The sum of softmax weights, one query at a time: ``[B, H, S]``; two query heads a KV head."""
    batch, heads, length, dim = k.shape
    window = queries.shape[2]
    total = torch.zeros(batch, heads, length, dtype=k.dtype)
    for b in range(batch):
        for h in range(2 * heads):
            for w in range(window):
                seen = length - window + w + 1
                p = (queries[b, h, w] @ k[b, h // 2, :seen].T / dim**0.5).softmax(-1)
                total[b, h // 2, :seen] += p
    return total


def test_votes_are_the_attention_of_the_last_queries() -> None:
    given = layer(120)
    assert given.queries.shape[2] == RECENT < 120
    expected = defined(given.queries, given.k)
    torch.testing.assert_close(attention.votes(given.queries, given.k), expected)


def test_what_is_received_is_the_attention_of_all_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    k = layer(70).k
    queries = torch.randn(2, 4, 70, 16, dtype=k.dtype)
    expected = defined(queries, k)
    for chunk in (256, 32):  # all at once, and the last chunk a short one
        monkeypatch.setattr(attention, "CHUNK", chunk)
        torch.testing.assert_close(attention.received(queries, k), expected)
    torch.testing.assert_close(expected.sum(-1), torch.full((2, 2), 140.0, dtype=k.dtype))


def test_sums_of_16_bit_keys_are_of_32() -> None:
    k = layer(600).k
    queries = torch.randn(2, 4, 600, 16, dtype=k.dtype)
    got = attention.received(queries.bfloat16(), k.bfloat16())
    assert got.dtype == torch.float32
    expected = defined(queries.bfloat16().double(), k.bfloat16().double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
