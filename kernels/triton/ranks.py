"""Which row of a plane belongs to which token: counted anew in each step, before the kernels.

A plane has rows for the tokens that are in it, in the order of the tokens (``kernels/planes.py``),
so the row of one is the number of those before it. Tokens of one kind are counted by programs of
their own. A program counts what lies before its tile of tokens by itself: levels take a byte a
token, which is little beside the codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

TOKENS = 1024
"""Tokens of a program."""

FIELD = tl.constexpr(8)
"""Bits of a count of one plane: those of all planes, five at most, share an integer, one of 32
bits for up to four."""

TURNS = tl.constexpr(255)
"""Levels that a lane may count in so many bits."""


@triton.jit
def _fields(level, lowest, highest, PLANES: tl.constexpr):
    """1 in the field of each plane that tokens of a level are in; a level of 255 is in none.

    Plane i has those of level ``lowest + i`` and above, up to ``highest``.
    """
    place = level.to(tl.int32) - lowest
    known = (place >= 0) & (level <= highest)
    if PLANES == 1:
        fields = known.to(tl.int32)
    elif PLANES <= 4:
        above = 3 - tl.minimum(tl.maximum(place, 0), PLANES - 1)
        fields = tl.where(known, 0x01010101 >> (above * FIELD), 0)
    else:
        above = 4 - tl.minimum(tl.maximum(place, 0), PLANES - 1)
        above = above.to(tl.int64)
        fields = tl.where(known, (above * 0 + 0x0101010101) >> (above * FIELD), 0)
    return fields


@triton.jit
def _rank(
    work, levels, coded, ranks, totals, capacity, tiles,
    FIRST: tl.constexpr, LAST: tl.constexpr, LOST: tl.constexpr,
    FIRST1: tl.constexpr, LAST1: tl.constexpr, LOST1: tl.constexpr,
    KINDS: tl.constexpr, PLANES: tl.constexpr, PAD: tl.constexpr,
    T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of tokens of one side and kind; see :func:`rank_kernel`."""
    start = work % tiles * T
    kind = work // tiles % KINDS
    b = (work // tiles // KINDS).to(tl.int64)
    lowest, highest, lost = FIRST, LAST, LOST
    if KINDS > 1:
        lowest = tl.where(kind == 0, FIRST, FIRST1)
        highest = tl.where(kind == 0, LAST, LAST1)
        lost = tl.where(kind == 0, LOST, LOST1)
    plane = tl.arange(0, PAD)
    shift = tl.minimum(plane, PLANES - 1) * FIELD
    base = levels + b * capacity
    end = tl.minimum(start, coded)
    count = tl.zeros([PAD], tl.int32)
    for part in tl.range(0, end, TURNS * BLOCK, num_stages=1):
        many = _fields(tl.full([BLOCK], 255, tl.uint8), lowest, highest, PLANES)  # none yet
        last = tl.minimum(part + TURNS * BLOCK, end)
        for first in tl.range(part, last, BLOCK, num_stages=1, loop_unroll_factor=4):
            i = first + tl.arange(0, BLOCK)
            many += _fields(tl.load(base + i, mask=i < end, other=255), lowest, highest, PLANES)
        # Summed behind the loop: no exchange in it.
        count += tl.sum(((many[None, :] >> shift[:, None]) & 255).to(tl.int32), 1)
    t = start + tl.arange(0, T)
    level = tl.load(base + t, mask=t < coded, other=255)
    fields = _fields(level, lowest, highest, PLANES)
    has = ((fields[None, :] >> shift[:, None]) & 1).to(tl.int32)  # [PAD, T]
    rank = count[:, None] + tl.cumsum(has, 1) - has
    own = (b * KINDS + kind) * PLANES + plane
    where = ranks + own[:, None] * capacity + t[None, :]
    known = (plane < PLANES)[:, None] & (t < capacity)[None, :]
    none = tl.where(level == lost, -2, -1)[None, :]
    tl.store(where, tl.where(has > 0, rank, none), mask=known)
    if start + T >= capacity:
        count += tl.sum(has, 1)
        tl.store(totals + own, count, mask=plane < PLANES)


@triton.jit
def rank_kernel(
    k_levels, v_levels, lengths, k_ranks, v_ranks, k_totals, v_totals, capacity, tiles, of_keys,
    KFIRST: tl.constexpr, KLAST: tl.constexpr, KLOST: tl.constexpr,
    KFIRST1: tl.constexpr, KLAST1: tl.constexpr, KLOST1: tl.constexpr,
    KPLANES: tl.constexpr, KPAD: tl.constexpr,
    VFIRST: tl.constexpr, VLAST: tl.constexpr, VLOST: tl.constexpr,
    VFIRST1: tl.constexpr, VLAST1: tl.constexpr, VLOST1: tl.constexpr,
    VPLANES: tl.constexpr, VPAD: tl.constexpr, KINDS: tl.constexpr,
    T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``ranks [B, KINDS, PLANES, C]`` int32, ``totals [B, KINDS, PLANES]``, of both sides.

    A rank is -1 where a token is not in the plane, -2 of tokens of its kind that were dropped.
    Plane i of a kind has tokens of levels FIRST + i to LAST, and LOST is the level of those that
    were dropped (names with 1: of the second kind). Tokens that are not coded are in none.

    of_keys: programs that count for keys; the others count for values.
    """
    work = tl.program_id(0)
    coded = tl.minimum(tl.load(lengths).to(tl.int32), capacity)
    if work < of_keys:
        if KPLANES:
            _rank(
                work, k_levels, coded, k_ranks, k_totals, capacity, tiles,
                KFIRST, KLAST, KLOST, KFIRST1, KLAST1, KLOST1, KINDS, KPLANES, KPAD, T, BLOCK,
            )  # fmt: skip
    elif VPLANES:
        _rank(
            work - of_keys, v_levels, coded, v_ranks, v_totals, capacity, tiles,
            VFIRST, VLAST, VLOST, VFIRST1, VLAST1, VLOST1, KINDS, VPLANES, VPAD, T, BLOCK,
        )  # fmt: skip
