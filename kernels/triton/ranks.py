"""Which row of a plane belongs to which token: counted anew in each step, before the kernels.

A plane has rows for the tokens that are in it, in the order of the tokens (``kernels/planes.py``),
so the row of one is the number of those before it. A program counts what lies before its tile of
tokens by itself: levels take a byte a token, which is little beside the codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

TOKENS = 1024
"""Tokens of a program."""

AT_ONCE = 2048
"""Levels before its tile that it counts at a time."""

FIELD = tl.constexpr(12)
"""Bits of a count of one plane: those of all planes share an integer of 64 bits. Enough for the
tokens of a tile, and for 4095 blocks before it."""


@triton.jit
def _fields(level, FIRST: tl.constexpr, PLANES: tl.constexpr, KINDS: tl.constexpr):
    """1 in the field of each plane that tokens of a level are in; a level of 255 is in none."""
    place = level.to(tl.int64) - FIRST
    known = (place >= 0) & (level < 255)
    place = tl.minimum(tl.maximum(place, 0), PLANES - 1)
    if KINDS:
        fields = (place * 0 + 1) << (place * FIELD)
    else:
        ones: tl.constexpr = 0x001001001001001
        fields = ones & (((place * 0 + 1) << ((place + 1) * FIELD)) - 1)
    return tl.where(known, fields, 0)


@triton.jit
def _rank(
    work, levels, coded, ranks, totals, capacity, tiles,
    FIRST: tl.constexpr, PLANES: tl.constexpr, PAD: tl.constexpr, KINDS: tl.constexpr,
    T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of tokens of one side; see :func:`rank_kernel`."""
    b = (work // tiles).to(tl.int64)
    start = work % tiles * T
    plane = tl.arange(0, PAD)
    shift = (tl.minimum(plane, PLANES - 1) * FIELD).to(tl.int64)
    base = levels + b * capacity
    end = tl.minimum(start, coded)
    many = tl.zeros([BLOCK], tl.int64)  # summed behind the loop: no exchange in it
    for first in tl.range(0, end, BLOCK, num_stages=1, loop_unroll_factor=4):
        i = first + tl.arange(0, BLOCK)
        many += _fields(tl.load(base + i, mask=i < end, other=255), FIRST, PLANES, KINDS)
    count = tl.sum(((many[None, :] >> shift[:, None]) & 4095).to(tl.int32), 1)
    t = start + tl.arange(0, T)
    fields = _fields(tl.load(base + t, mask=t < coded, other=255), FIRST, PLANES, KINDS)
    has = (fields[None, :] >> shift[:, None]) & 1  # [PAD, T]
    before = (tl.cumsum(fields, 0) - fields)[None, :] >> shift[:, None]
    rank = count[:, None] + (before & 4095).to(tl.int32)
    where = ranks + (b * PLANES + plane)[:, None] * capacity + t[None, :]
    known = (plane < PLANES)[:, None] & (t < capacity)[None, :]
    tl.store(where, tl.where(has > 0, rank, -1), mask=known)
    if start + T >= capacity:
        count += tl.sum(has.to(tl.int32), 1)
        tl.store(totals + b * PLANES + plane, count, mask=plane < PLANES)


@triton.jit
def rank_kernel(
    k_levels, v_levels, lengths, k_ranks, v_ranks, k_totals, v_totals, capacity, tiles, of_keys,
    KFIRST: tl.constexpr, KPLANES: tl.constexpr, KPAD: tl.constexpr,
    VFIRST: tl.constexpr, VPLANES: tl.constexpr, VPAD: tl.constexpr, KINDS: tl.constexpr,
    T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``ranks [B, PLANES, C]`` int32, -1 where a token is not in the plane; ``totals [B, PLANES]``.

    Of the planes of both sides from their planes FIRST on: those of levels FIRST and above, or
    with KINDS of that level alone. Tokens that are not coded are in none.

    of_keys: programs that count for keys; the others count for values.
    """
    work = tl.program_id(0)
    coded = tl.minimum(tl.load(lengths).to(tl.int32), capacity)
    if work < of_keys:
        if KPLANES:
            _rank(
                work, k_levels, coded, k_ranks, k_totals, capacity, tiles,
                KFIRST, KPLANES, KPAD, KINDS, T, BLOCK,
            )  # fmt: skip
    elif VPLANES:
        _rank(
            work - of_keys, v_levels, coded, v_ranks, v_totals, capacity, tiles,
            VFIRST, VPLANES, VPAD, KINDS, T, BLOCK,
        )  # fmt: skip
