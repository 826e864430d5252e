from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.quality.rivals.base import RECENT, SINKS, Size
from benchmarks.quality.rivals.h2o import H2O
from benchmarks.quality.rivals.snapkv import POOL, SnapKv
from benchmarks.quality.rivals.streaming import Streaming

from .cases import assert_exact_outside, layer


def test_streaming_keeps_sinks_and_the_latest_tokens() -> None:
    given = layer(SINKS + RECENT + 40)
    k, v = Streaming(4).code(given)
    for kept, x in ((k, given.k), (v, given.v)):
        expected = torch.cat([x[:, :, :SINKS], x[:, :, -RECENT - 10 :]], 2)
        assert torch.equal(kept, expected)


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


def test_h2o_keeps_what_received_most_and_the_latest_tokens() -> None:
    """By the definition, one head and token at a time."""
    given = layer(SINKS + RECENT + 41)
    k, v = H2O(4).code(given)
    assert H2O(4).kept(41) == 10  # five of each kind
    for b in range(2):
        for h in range(2):
            attention = given.received[b, h].tolist()
            older, recent = range(SINKS, SINKS + 36), range(SINKS + 36, SINKS + 41)
            heavy = sorted(older, key=lambda t: -attention[t])[:5]
            wanted = [*range(SINKS), *sorted(heavy), *recent]
            wanted += range(SINKS + 41, SINKS + 41 + RECENT)
            assert torch.equal(k[b, h], given.k[b, h, wanted])
            assert torch.equal(v[b, h], given.v[b, h, wanted])


def test_the_odd_token_of_h2o_is_a_heavy_hitter() -> None:
    given = layer(SINKS + RECENT + 40)
    places = H2O(40 / 3).places(given)
    assert places.shape == (2, 2, 3)
    assert (places[..., -1] == 39).all() and (places[..., :2] < 39).all()
    assert (places.diff(dim=-1) > 0).all()


def test_bytes() -> None:
    size = Size(800, 3, 64)
    for code in (Streaming(8), SnapKv(8), H2O(8)):
        assert code.coded_bytes(size) == 2 * 2 * 100 * 192
        assert code.ratio(size) == 8
        assert 5 < code.whole_ratio(800 + SINKS + RECENT, 3, 64) < 8
