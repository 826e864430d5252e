"""Scores, masks and gains of one tile of tokens: what programs over codes and over pools share.

In this folder a tile has tokens along its first dimension and query rows along its second, as far
as codes take part: codes are the left operand of all products, so that tensor cores of a warp
group read them from registers and all query rows of a group meet them at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import converted, load_run


@triton.jit
def _load_q(
    base, rows, some, CODE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """Folded queries for one code of each word of a run, ``[PAD / 2, rows]``; 0 where not some.

    START: the run's first component. WIDTH: its bytes. PAD: those of the tile.
    """
    word = tl.arange(0, PAD // 2)
    where = base + START + CODE * (WIDTH // 2) + rows[None, :] * KW + word[:, None]
    return tl.load(where, mask=(word < WIDTH // 2)[:, None] & some[None, :], other=0.0)


@triton.jit
def load_queries(
    base, rows, some, W8: tl.constexpr, W4: tl.constexpr, W2: tl.constexpr,
    P8: tl.constexpr, P4: tl.constexpr, P2: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """All folded queries, in the order that :func:`code_scores` takes; 0.0 where there is no run.

    W8, W4, W2: bytes of the runs. P8, P4, P2: those of their tiles.
    """
    at: tl.constexpr = W8 + 2 * W4
    q8_0, q8_1, q4_0, q4_1, q4_2, q4_3 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    q2_0, q2_1, q2_2, q2_3, q2_4, q2_5, q2_6, q2_7 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if W8:
        q8_0 = _load_q(base, rows, some, 0, 0, W8, P8, KW)
        q8_1 = _load_q(base, rows, some, 1, 0, W8, P8, KW)
    if W4:
        q4_0 = _load_q(base, rows, some, 0, W8, W4, P4, KW)
        q4_1 = _load_q(base, rows, some, 1, W8, W4, P4, KW)
        q4_2 = _load_q(base, rows, some, 2, W8, W4, P4, KW)
        q4_3 = _load_q(base, rows, some, 3, W8, W4, P4, KW)
    if W2:
        q2_0 = _load_q(base, rows, some, 0, at, W2, P2, KW)
        q2_1 = _load_q(base, rows, some, 1, at, W2, P2, KW)
        q2_2 = _load_q(base, rows, some, 2, at, W2, P2, KW)
        q2_3 = _load_q(base, rows, some, 3, at, W2, P2, KW)
        q2_4 = _load_q(base, rows, some, 4, at, W2, P2, KW)
        q2_5 = _load_q(base, rows, some, 5, at, W2, P2, KW)
        q2_6 = _load_q(base, rows, some, 6, at, W2, P2, KW)
        q2_7 = _load_q(base, rows, some, 7, at, W2, P2, KW)
    return q8_0, q8_1, q4_0, q4_1, q4_2, q4_3, q2_0, q2_1, q2_2, q2_3, q2_4, q2_5, q2_6, q2_7


@triton.jit
def code_scores(
    q8_0, q8_1, q4_0, q4_1, q4_2, q4_3,
    q2_0, q2_1, q2_2, q2_3, q2_4, q2_5, q2_6, q2_7, base, tokens, live,
    ROWS: tl.constexpr, TILE: tl.constexpr, PITCH: tl.constexpr,
    W8: tl.constexpr, W4: tl.constexpr, W2: tl.constexpr,
    P8: tl.constexpr, P4: tl.constexpr, P2: tl.constexpr,
    ALL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Codes as they are converted against folded queries: ``[TILE, ROWS]``."""
    s = tl.full([TILE, ROWS], 0.0, tl.float32)
    if W8:
        words = load_run(base, tokens, live, PITCH, 0, W8, P8, ALL, False)
        s = tl.dot(converted(words, 8, 0, ASM), q8_0, s)
        s = tl.dot(converted(words, 8, 1, ASM), q8_1, s)
    if W4:
        words = load_run(base, tokens, live, PITCH, W8, W4, P4, ALL, False)
        s = tl.dot(converted(words, 4, 0, ASM), q4_0, s)
        s = tl.dot(converted(words, 4, 1, ASM), q4_1, s)
        s = tl.dot(converted(words, 4, 2, ASM), q4_2, s)
        s = tl.dot(converted(words, 4, 3, ASM), q4_3, s)
    if W2:
        words = load_run(base, tokens, live, PITCH, W8 + W4, W2, P2, ALL, False)
        s = tl.dot(converted(words, 2, 0, ASM), q2_0, s)
        s = tl.dot(converted(words, 2, 1, ASM), q2_1, s)
        s = tl.dot(converted(words, 2, 2, ASM), q2_2, s)
        s = tl.dot(converted(words, 2, 3, ASM), q2_3, s)
        s = tl.dot(converted(words, 2, 4, ASM), q2_4, s)
        s = tl.dot(converted(words, 2, 5, ASM), q2_5, s)
        s = tl.dot(converted(words, 2, 6, ASM), q2_6, s)
        s = tl.dot(converted(words, 2, 7, ASM), q2_7, s)
    return s


@triton.jit
def listed(tokens, positions, count: tl.constexpr, PAD: tl.constexpr, coded):
    """Which of ``tokens`` one sequence's pool holds."""
    slot = tl.arange(0, PAD)
    held = tl.load(positions + slot, mask=slot < count, other=-1).to(tl.int32)
    held = tl.where(held < coded, held, -1)
    return tl.sum((tokens[:, None] == held[None, :]).to(tl.int32), 1) > 0


@triton.jit
def coarseness(tiles):
    """Log2 of the tiles that share a bit of :func:`held_tiles`, so that 64 bits are enough."""
    coarse = 0
    for i in tl.static_range(20):
        coarse += (((tiles - 1) >> (6 + i)) > 0).to(tl.int32)
    return coarse


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def held_tiles(
    positions, count: tl.constexpr, PAD: tl.constexpr, coded, first, N: tl.constexpr, coarse
):
    """In which of 64 pieces behind ``first``, of 2^coarse tiles each, a pool holds tokens.

    A bit for each: to look up every token of a tile takes 175 instructions, and few tiles have any.
    """
    slot = tl.arange(0, PAD)
    held = tl.load(positions + slot, mask=slot < count, other=-1).to(tl.int32)
    piece = ((held - first) // N) >> coarse
    known = (held >= first) & (held < coded) & (piece < 64)
    bit = tl.full([PAD], 1, tl.int64) << tl.where(known, piece, 0).to(tl.int64)
    return tl.reduce(tl.where(known, bit, 0), 0, _either)


@triton.jit
def biased(s, bias, slots, live, rows_bias, BIAS: tl.constexpr):
    """Scores ``[tokens, rows]`` with the mask; -inf where a token is not live or hidden.

    BIAS: 0 without a mask, 1 if it is the same for all rows, 2 if not.
    """
    if BIAS == 0:
        return tl.where(live[:, None], s, -float("inf"))
    elif BIAS == 1:
        add = tl.load(bias + slots, mask=live, other=-float("inf")) * 1.4426950408889634
        return tl.where((add == -float("inf"))[:, None], -float("inf"), s + add[:, None])
    else:
        where = bias + rows_bias[None, :] + slots[:, None]
        add = tl.load(where, mask=live[:, None], other=-float("inf")) * 1.4426950408889634
        return tl.where(add == -float("inf"), -float("inf"), s + add)


@triton.jit
def capped(s, CAP: tl.constexpr, ASM: tl.constexpr):
    """Scores in units of log2 with a softcap: ``log2(e) CAP tanh(s / (log2(e) CAP))``.

    tanh(x) = 1 - 2 / (1 + e^2x): its error is that of 1, some 1e-5 of a score for a cap of 50;
    the GPU's own tanh has one 10,000 times as large.
    """
    return (1.4426950408889634 * CAP) * (1.0 - 2.0 / (1.0 + exp2(s * (2.0 / CAP), ASM)))


@triton.jit
def gains(base, tokens, live, GROUPS: tl.constexpr):
    """The gains of tokens in one group of heads, 1 where there is none."""
    return tl.load(base + tokens * GROUPS, mask=live, other=1.0)


@triton.jit
def log2_bound(gain):
    """At least log2 of a gain (float32), at most 1 more: its exponent, read off its bits.

    Gains below 2^-24 count as that: a float16 gain is no less, unless it is 0.
    """
    return tl.maximum((gain.to(tl.int32, bitcast=True) >> 23) - 126, -24).to(tl.float32)


@triton.jit
def exp2(x, ASM: tl.constexpr):
    """2^x; 0 where that is less than float32's least normal number."""
    if ASM:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def product(a, b, acc, ASM: tl.constexpr):
    """``acc + a b``; in float32 under the interpreter, which takes bfloat16 for integers."""
    if ASM:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
