"""Which rows of the codes belong together, where rows are not tokens or where many are exact.

Dropped tokens have no row, keys and values may have different ones, and a token that the pool
holds is read from there. So each step begins with a list: of each entry its token (-1: there is
none to see), where its key is and where its value is:

    0, 1, ..     that row of the codes
    -1, -2, ..   slot 0, 1, .. of the pool

Entries are those of the rows of the keys, in their order: that of row n is entry n. Behind them,
where tokens may be dropped, each slot of both pools has one: that of a token that has none by its
row.
"""

from __future__ import annotations

import triton
import triton.language as tl

TOKENS_LISTED = 1024
"""Tokens of a program."""

SLOTS_AT_ONCE = 64
"""Slots that a program looks at at a time."""


@triton.jit
def _find(positions, slots, first, last, found, tokens, T: tl.constexpr, E: tl.constexpr):
    """Slot of each of ``tokens``, ``first .. last`` at most, -1 if it has none: ``[T]``.

    found: numbers for all tokens of the sequence, of which only those of this program are touched.
    """
    tl.store(found + tokens, tl.full([T], -1, tl.int32), mask=tokens < last)
    tl.debug_barrier()
    for start in tl.range(0, slots, E, num_stages=1):
        e = start + tl.arange(0, E)
        held = tl.load(positions + e, mask=e < slots, other=-1).to(tl.int32)
        tl.store(found + held, e, mask=(held >= first) & (held < last))
    tl.debug_barrier()
    return tl.load(found + tokens, mask=tokens < last, other=-1)


@triton.jit
def _write(entries, at, length, token, k_at, v_at, seen, mask):
    """Entries ``[3, length]`` of one sequence: token, key, value; of none what is not seen."""
    tl.store(entries + at, tl.where(seen, token, -1), mask=mask)
    tl.store(entries + length + at, tl.where(seen, k_at, 0), mask=mask)
    tl.store(entries + 2 * length + at, tl.where(seen, v_at, -1), mask=mask)


@triton.jit
def _place(slot, row):
    return tl.where(slot >= 0, -1 - slot, row)


@triton.jit
def list_rows(
    b, tile, k_ranks, v_ranks, k_totals, k_pos, v_pos, coded, found, entries, counts,
    capacity, length, k_slots, v_slots,
    KPLANES: tl.constexpr, VPLANES: tl.constexpr, PLANE: tl.constexpr, MORE: tl.constexpr,
    T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Entries of a tile of tokens whose keys have a row."""
    first = tile * T
    last = tl.minimum(first + T, coded)
    t = first + tl.arange(0, T)
    inside = t < last
    k_slot = _find(k_pos + b * k_slots, k_slots, first, last, found + 2 * b * capacity, t, T, E)
    v_slot = _find(
        v_pos + b * v_slots, v_slots, first, last, found + (2 * b + 1) * capacity, t, T, E
    )
    if KPLANES:
        k_row = tl.load(k_ranks + (b * KPLANES + PLANE) * capacity + t, mask=inside, other=-1)
    else:
        k_row = t
    if VPLANES:
        v_row = tl.load(v_ranks + (b * VPLANES + PLANE) * capacity + t, mask=inside, other=-1)
    else:
        v_row = t
    mine = inside & (k_row >= 0)
    seen = mine & ((v_row >= 0) | (v_slot >= 0))
    _write(
        entries + 3 * b * length, k_row, length, t, _place(k_slot, k_row), _place(v_slot, v_row),
        seen, mine,
    )  # fmt: skip
    if tile == 0:
        if KPLANES:
            rows = tl.load(k_totals + b * KPLANES + PLANE)
        else:
            rows = coded
        if MORE:
            rows += k_slots + v_slots
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
def list_slots(
    b, tile, k_ranks, v_ranks, k_totals, k_pos, v_pos, k_pool, v_pool, coded, entries,
    capacity, length, k_slots, v_slots,
    H: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    KPLANES: tl.constexpr, VPLANES: tl.constexpr, PLANE: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Entries of E slots of both pools, of tokens that have none by the row of their key.

    A token whose key or value was dropped is seen if the pools have what is lacking; and if they
    have something of it that is no number: what comes of it then is none either.
    """
    rows = coded
    if KPLANES:
        rows = tl.load(k_totals + b * KPLANES + PLANE)
    e = tile * E + tl.arange(0, E)
    ranks = k_ranks + (b * KPLANES + PLANE) * capacity

    token = tl.load(k_pos + b * k_slots + e, mask=e < k_slots, other=-1).to(tl.int32)
    live = (token >= 0) & (token < coded)
    v_slot = _slot_among(token, v_pos + b * v_slots, v_slots, E)
    v_row = token
    if VPLANES:
        v_row = tl.load(v_ranks + (b * VPLANES + PLANE) * capacity + token, mask=live, other=-1)
    has_value = (v_row >= 0) | (v_slot >= 0)
    seen = live & (has_value == 0) & _broken(k_pool, b, e, k_slots, H, DK, DKP, E)
    if KPLANES:
        seen |= live & has_value & (tl.load(ranks + token, mask=live, other=0) < 0)
    v_at = _place(v_slot, tl.maximum(v_row, 0))
    own = entries + 3 * b * length
    _write(own, rows + e, length, token, -1 - e, v_at, seen, e < k_slots)

    token = tl.load(v_pos + b * v_slots + e, mask=e < v_slots, other=-1).to(tl.int32)
    seen = (token >= 0) & (token < coded)
    if KPLANES:
        seen &= tl.load(ranks + token, mask=seen, other=0) < 0
        seen &= _slot_among(token, k_pos + b * k_slots, k_slots, E) < 0
        seen &= _broken(v_pool, b, e, v_slots, H, DV, DVP, E)
    else:
        seen &= e < 0
    _write(own, rows + k_slots + e, length, token, tl.zeros_like(e), -1 - e, seen, e < v_slots)
