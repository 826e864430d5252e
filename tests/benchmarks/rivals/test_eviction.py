from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.quality.rivals.base import RECENT, SINKS, Size
from benchmarks.quality.rivals.snapkv import POOL, SnapKv, votes
from benchmarks.quality.rivals.streaming import Streaming

from .cases import assert_exact_outside, layer


def test_streaming_keeps_sinks_and_the_latest_tokens() -> None:
    given = layer(SINKS + RECENT + 40)
    k, v = Streaming(4).code(given)
    for kept, x in ((k, given.k), (v, given.v)):
        expected = torch.cat([x[:, :, :SINKS], x[:, :, -RECENT - 10 :]], 2)
        assert torch.equal(kept, expected)


def test_votes_are_the_attention_of_the_last_queries() -> None:
    given = layer(120)
    q, k = given.queries, given.k
    expected = torch.zeros(2, 2, 120, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            for w in range(RECENT):
                seen = 120 - RECENT + w + 1
                p = (q[b, h, w] @ k[b, h // 2, :seen].T / 4).softmax(-1)
                expected[b, h // 2, :seen] += p
    torch.testing.assert_close(votes(q, k), expected)


def test_snapkv_keeps_the_tokens_that_are_attended_to_and_their_neighbours() -> None:
    given = layer(SINKS + RECENT + 40)
    k = torch.zeros_like(given.k)
    k[..., 0] = -1.0
    wanted = {0: 20, 1: 40}  # by KV head: one place that every query looks at
    for head, place in wanted.items():
        k[:, head, place, 0] = 50.0
    queries = torch.zeros_like(given.queries)
    queries[..., 0] = 4.0
    positions = torch.arange(k.shape[2], dtype=k.dtype)[:, None].expand_as(k)
    marked = replace(given, k=k, v=positions, queries=queries)
    kept_k, kept_v = SnapKv(40 / POOL).code(marked)
    assert kept_k.shape[2] == SINKS + POOL + RECENT
    for head, place in wanted.items():
        middle = kept_v[0, head, SINKS:-RECENT, 0].long().tolist()
        assert middle == list(range(place - POOL // 2, place + POOL // 2 + 1))
    assert_exact_outside(kept_k, k)


def test_bytes() -> None:
    size = Size(800, 3, 64)
    for code in (Streaming(8), SnapKv(8)):
        assert code.coded_bytes(size) == 2 * 2 * 100 * 192
        assert code.ratio(size) == 8
        assert 5 < code.whole_ratio(800 + SINKS + RECENT, 3, 64) < 8
