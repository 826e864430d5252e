"""Values in tiers laid out as a plain code, one step at a time, for the kernel over tokens.

Bits of a tier lie in planes, which have rows for some tokens only (``codec/tiered.py``). Here they
are put together to codes of 8, 4 and 2 bits, in the order of ``codec/bits.py``, bits that a token
lacks 0. How many it lacks is left beside the codes: what they stand for in the mean is added to
sums over tokens (``lacked``).
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = 64
"""Tokens of a program."""


@triton.jit
def lacked(lacks, BITS: tl.constexpr):
    """What is added to codes of BITS bits of tokens that lack some: float32, as ``lacks``."""
    least = tl.minimum(lacks, BITS)
    return ((1 << least) - 1).to(tl.float32) * 0.5


@triton.jit
def _words(base, WORD: tl.constexpr):
    """Addresses of bytes as those of words of 2 or 4."""
    if WORD == 4:
        return base.to(tl.pointer_type(tl.uint32))
    else:
        return base.to(tl.pointer_type(tl.uint16))


@triton.jit
def _digit(base, c, some, SIZE: tl.constexpr, COUNT: tl.constexpr, WORD: tl.constexpr):
    """Digits of SIZE bits of components WORD c, WORD c + 1, .. of a run of COUNT, one in each byte.

    c is in words, so that Triton sees which of them lie side by side.
    """
    WIDTH: tl.constexpr = COUNT * SIZE // 8 // WORD
    EACH: tl.constexpr = ((1 << SIZE) - 1) * (0x01010101 if WORD == 4 else 0x0101)
    word = tl.load(_words(base, WORD) + (c % WIDTH)[None, :], mask=some, other=0)
    return (word.to(tl.uint32) >> (c // WIDTH * SIZE)[None, :].to(tl.uint32)) & EACH


@triton.jit
def _run(
    base, plane1, plane2, plane3, plane4, has1, has2, has3, has4, out, there,
    BITS: tl.constexpr, COUNT: tl.constexpr, PAD: tl.constexpr, START: tl.constexpr,
    OFF: tl.constexpr, PLANES: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr, T: tl.constexpr,
    WORD: tl.constexpr,
):  # fmt: skip
    """One run of a tile of tokens: ``[T, COUNT * BITS / 8]`` bytes to ``out``.

    START: the run's first component. OFF: its first byte among leading bits. N1 .. N4: components
    that the planes hold.
    """
    WIDTH: tl.constexpr = COUNT * BITS // 8 // WORD
    LEFT: tl.constexpr = BITS - PLANES if BITS > PLANES else 0  # leading bits
    j = tl.arange(0, PAD // WORD)
    some = there[:, None] & (j < WIDTH)[None, :]
    bytes_ = tl.zeros([T, PAD // WORD], tl.uint32)
    for m in tl.static_range(8 // BITS):
        c = j + m * WIDTH
        u = tl.zeros([T, PAD // WORD], tl.uint32)
        if LEFT & 4:
            u += _digit(base + OFF, c, some, 4, COUNT, WORD) << (BITS - 4)
        if LEFT & 2:
            first = base + (OFF + (LEFT & 4) * COUNT // 8)
            u += _digit(first, c, some, 2, COUNT, WORD) << (BITS - (LEFT & 6))
        if LEFT & 1:
            first = base + (OFF + (LEFT & 6) * COUNT // 8)
            u += _digit(first, c, some, 1, COUNT, WORD) << (BITS - LEFT)
        if BITS > PLANES - 1:
            u += _digit(plane1, c + START // WORD, some & has1[:, None], 1, N1, WORD) << (
                PLANES - 1
            )
        if PLANES > 1 and BITS > PLANES - 2:
            u += _digit(plane2, c + START // WORD, some & has2[:, None], 1, N2, WORD) << (
                PLANES - 2
            )
        if PLANES > 2 and BITS > PLANES - 3:
            u += _digit(plane3, c + START // WORD, some & has3[:, None], 1, N3, WORD) << (
                PLANES - 3
            )
        if PLANES > 3:
            u += _digit(plane4, c + START // WORD, some & has4[:, None], 1, N4, WORD)
        bytes_ += u << (BITS * m)
    where = _words(out, WORD) + j[None, :]
    tl.store(where, bytes_.to(where.dtype.element_ty), mask=some)


@triton.jit
def _plane(base, ranks, b, g, rows, G: tl.constexpr, N: tl.constexpr):
    """Addresses of the rows of tokens in a plane, and which of them are in it."""
    has = ranks >= 0
    row = b * rows + tl.where(has, ranks, 0)
    return base + (row * (G * N // 8) + g * (N // 8))[:, None], has


@triton.jit
def spread_kernel(
    base, plane1, plane2, plane3, plane4, ranks, codes, lacks,
    capacity, rows, rows1, rows2, rows3, rows4, tiles,
    G: tl.constexpr, R8: tl.constexpr, R4: tl.constexpr, R2: tl.constexpr,
    P8: tl.constexpr, P4: tl.constexpr, P2: tl.constexpr, WIDTH: tl.constexpr,
    PLANES: tl.constexpr, WHOLE: tl.constexpr, RANKS: tl.constexpr, RANK: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr, T: tl.constexpr,
    WORD: tl.constexpr,
):  # fmt: skip
    """``codes [B, rows, G * bytes]``, ``lacks [B, rows]`` uint8, a tile of tokens of one group.

    ranks: of ``rank_kernel``, RANKS of each sequence, from RANK on those of the planes; without
    WHOLE, first of the leading bits, whose rows are those of the result (tokens that were dropped,
    or are of another kind, have none). rows, rows1 ..: rows that tensors
    have room for. WIDTH: leading bytes of a group of a token. P*: bytes of runs in tiles. WORD:
    bytes that are made at a time, of which all widths are multiples.
    """
    g = tl.program_id(0) % G
    tile = tl.program_id(0) // G % tiles
    b = (tl.program_id(0) // (G * tiles)).to(tl.int64)
    t = tile * T + tl.arange(0, T)
    inside = t < capacity
    FIRST: tl.constexpr = 0 if WHOLE else 1
    at = ranks + (b * RANKS + RANK) * capacity + t
    if WHOLE:
        row = t
    else:
        row = tl.load(at, mask=inside, other=-1)
    there = inside & (row >= 0)
    at += FIRST * capacity
    first, has1 = _plane(plane1, tl.load(at, mask=inside, other=-1), b, g, rows1, G, N1)
    lack = PLANES - has1.to(tl.int32)
    second, third, fourth = first, first, first
    has2, has3, has4 = has1, has1, has1
    if PLANES > 1:
        at += capacity
        second, has2 = _plane(plane2, tl.load(at, mask=inside, other=-1), b, g, rows2, G, N2)
        lack -= has2.to(tl.int32)
    if PLANES > 2:
        at += capacity
        third, has3 = _plane(plane3, tl.load(at, mask=inside, other=-1), b, g, rows3, G, N3)
        lack -= has3.to(tl.int32)
    if PLANES > 3:
        at += capacity
        fourth, has4 = _plane(plane4, tl.load(at, mask=inside, other=-1), b, g, rows4, G, N4)
        lack -= has4.to(tl.int32)
    own = b * rows + tl.where(there, row, 0)
    if g == 0:
        tl.store(lacks + own, lack.to(tl.uint8), mask=there)
    lead = base + (own * (G * WIDTH) + g * WIDTH)[:, None]
    BYTES: tl.constexpr = R8 + R4 // 2 + R2 // 4
    out = codes + (own * (G * BYTES) + g * BYTES)[:, None]
    OFF4: tl.constexpr = R8 * (8 - PLANES) // 8
    OFF2: tl.constexpr = OFF4 + (R4 * (4 - PLANES) // 8 if PLANES < 4 else 0)
    if R8:
        _run(
            lead, first, second, third, fourth, has1, has2, has3, has4, out, there,
            8, R8, P8, 0, 0, PLANES, N1, N2, N3, N4, T, WORD,
        )  # fmt: skip
    if R4:
        _run(
            lead, first, second, third, fourth, has1, has2, has3, has4, out + R8, there,
            4, R4, P4, R8, OFF4, PLANES, N1, N2, N3, N4, T, WORD,
        )  # fmt: skip
    if R2:
        _run(
            lead, first, second, third, fourth, has1, has2, has3, has4, out + (R8 + R4 // 2),
            there, 2, R2, P2, R8 + R4, OFF2, PLANES, N1, N2, N3, N4, T, WORD,
        )  # fmt: skip
