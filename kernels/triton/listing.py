"""Which rows of the codes belong together, where rows are not tokens or where many are exact.

Dropped tokens have no row, keys and values may have different ones, and a token that the pool
holds is read from there. So each step begins with a list: of each entry its token (-1: there is
none to see), where its key is and where its value is:

    0, 1, ..     that row of the codes
    -1, -2, ..   slot 0, 1, .. of the pool

First come the rows of the keys: entry n is the token of row n, if no pool holds it. Behind room for
all of them each slot of the pool of keys has an entry, then each of that of values.
"""

from __future__ import annotations

import triton
import triton.language as tl

TOKENS_LISTED = 1024
"""Tokens of a program."""


@triton.jit
def _mark(positions, slots, first, last, found, E: tl.constexpr):
    """1 for each of the tokens ``first .. last`` that has a slot."""
    for start in tl.range(0, slots, E, num_stages=1):
        e = start + tl.arange(0, E)
        held = tl.load(positions + e, mask=e < slots, other=-1).to(tl.int32)
        here = (held >= first) & (held < last)
        tl.store(found + held, tl.full([E], 1, tl.uint8), mask=here)


@triton.jit
def list_rows(
    b, tile, k_ranks, v_ranks, k_totals, k_pos, v_pos, coded, found, entries, counts,
    capacity, length, k_slots, v_slots,
    KPLANES: tl.constexpr, VPLANES: tl.constexpr, KPLANE: tl.constexpr, VPLANE: tl.constexpr,
    T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Entries of a tile of tokens whose keys have a row.

    found: a number for each token of each sequence, of which a program touches those of its tile.
    """
    first = tile * T
    last = tl.minimum(first + T, coded)
    t = first + tl.arange(0, T)
    inside = t < last
    found += b * capacity
    tl.store(found + t, tl.zeros([T], tl.uint8), mask=inside)
    tl.debug_barrier()
    _mark(k_pos + b * k_slots, k_slots, first, last, found, E)
    _mark(v_pos + b * v_slots, v_slots, first, last, found, E)
    tl.debug_barrier()
    pooled = tl.load(found + t, mask=inside, other=0) > 0
    if KPLANES:
        k_row = tl.load(k_ranks + (b * KPLANES + KPLANE) * capacity + t, mask=inside, other=-1)
    else:
        k_row = t
    if VPLANES:
        v_row = tl.load(v_ranks + (b * VPLANES + VPLANE) * capacity + t, mask=inside, other=-1)
    else:
        v_row = t
    mine = inside & (k_row >= 0)
    seen = mine & (v_row >= 0) & (pooled == 0)
    own = entries + 3 * b * length
    tl.store(own + k_row, tl.where(seen, t, -1), mask=mine)
    tl.store(own + 2 * length + k_row, tl.where(seen, v_row, -1), mask=mine)
    if tile == 0:
        if KPLANES:
            rows = tl.load(k_totals + b * KPLANES + KPLANE)
        else:
            rows = coded
        tl.store(counts + b, rows)


@triton.jit
def _broken(
    pool, b, e, slots, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Which of slots e have a number that is none: ``[E]`` bool."""
    d = tl.arange(0, DP)
    bad = tl.zeros([E], tl.int32)
    for h in tl.range(0, H, loop_unroll_factor=4):
        where = pool + ((b * H + h) * slots + e)[:, None] * D + d[None, :]
        x = tl.load(where, mask=(e < slots)[:, None] & (d < D)[None, :], other=0.0)
        x = x.to(tl.float32)
        bad += tl.sum((x - x != 0.0).to(tl.int32), 1)
    return bad > 0


@triton.jit
def _slot_among(tokens, positions, slots, E: tl.constexpr):
    """The slot that each token has in a pool, -1 if none."""
    slot = tl.full([E], -1, tl.int32)
    for start in tl.range(0, slots, E, num_stages=1):
        e = start + tl.arange(0, E)
        held = tl.load(positions + e, mask=e < slots, other=-1).to(tl.int32)
        same = (held[None, :] == tokens[:, None]) & (held >= 0)[None, :]
        slot = tl.maximum(slot, tl.max(tl.where(same, e[None, :], -1), 1))
    return slot


@triton.jit
def _row(ranks, tokens, live, b, capacity, PLANES: tl.constexpr, PLANE: tl.constexpr):
    """The row of each token in a plane; below 0 if it has none (``ranks.py``)."""
    if PLANES:
        row = tl.load(ranks + (b * PLANES + PLANE) * capacity + tokens, mask=live, other=-1)
    else:
        row = tl.where(live, tokens, -1)
    return row


@triton.jit
def list_slots(
    b, tile, k_ranks, v_ranks, k_pos, v_pos, k_pool, v_pool, coded, entries,
    capacity, length, k_slots, v_slots,
    H: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    KPLANES: tl.constexpr, VPLANES: tl.constexpr, KPLANE: tl.constexpr, VPLANE: tl.constexpr,
    DROPS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Entries of E slots of the pool of keys, and of E of that of values.

    A token that both pools hold has that of the keys. DROPS: tokens may be dropped. One whose other
    half was dropped (its row is -2) is seen only if what the pool has of it is no number, with a
    score that is none either: that of a slot behind the last one (``slots.py``). A token whose row
    is -1 is of another kind.
    """
    e = tile * E + tl.arange(0, E)
    k_token = tl.load(k_pos + b * k_slots + e, mask=e < k_slots, other=-1).to(tl.int32)
    v_token = tl.load(v_pos + b * v_slots + e, mask=e < v_slots, other=-1).to(tl.int32)
    k_live = (k_token >= 0) & (k_token < coded)
    v_live = (v_token >= 0) & (v_token < coded)
    v_row = _row(v_ranks, k_token, k_live, b, capacity, VPLANES, VPLANE)
    k_row = _row(k_ranks, v_token, v_live, b, capacity, KPLANES, KPLANE)
    v_slot = _slot_among(k_token, v_pos + b * v_slots, v_slots, E)
    v_live &= _slot_among(v_token, k_pos + b * k_slots, k_slots, E) < 0
    k_live &= v_row != -1
    v_live &= k_row != -1
    has_value, has_key = (v_row >= 0) | (v_slot >= 0), k_row >= 0
    k_at, other_k_at = -1 - e, tl.maximum(k_row, 0)
    if DROPS:
        k_live &= has_value | _broken(k_pool, b, e, k_slots, H, DK, DKP, E)
        v_live &= has_key | _broken(v_pool, b, e, v_slots, H, DV, DVP, E)
        k_at = tl.where(has_value, k_at, -1 - k_slots)
        other_k_at = tl.where(has_key, other_k_at, -1 - k_slots)
    v_at = tl.where(v_slot >= 0, -1 - v_slot, tl.maximum(v_row, 0))
    own = entries + 3 * b * length + length - k_slots - v_slots
    tl.store(own + e, tl.where(k_live, k_token, -1), mask=e < k_slots)
    tl.store(own + length + e, k_at, mask=e < k_slots)
    tl.store(own + 2 * length + e, tl.where(k_live, v_at, -1), mask=e < k_slots)
    own += k_slots
    tl.store(own + e, tl.where(v_live, v_token, -1), mask=e < v_slots)
    tl.store(own + length + e, other_k_at, mask=e < v_slots)
    tl.store(own + 2 * length + e, -1 - e, mask=e < v_slots)
