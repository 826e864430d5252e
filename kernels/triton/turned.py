"""Scores of keys that were coded before their rotary embedding.

Queries cannot be folded into the space of such codes: each token turns its key by its own angle.
So keys are rebuilt, a tile of one KV head at a time, turned in registers, and forgotten:

    z = codes basis,   x = gain (z - what codes have too much) + mean,   k = R_position x

Channels that turn together lie side by side, so that a thread holds both numbers of a pair; those
that are not rotated are paired as well, and turn by no angle.

Basis, keys and queries are float16, and all sums float32. Keys are multiplied by the span of the
code (``codec/transform.py``), which brings them into the range of float16, queries by a power of
two; scores take both back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import OFFSET, OFFSET_8, component
from .score import code_scores

LOWER = tl.constexpr(0.25)
"""Numbers that were coded are at most 65504 times the span about their mean; turned ones can be
greater by the root of two, and have the mean in them."""

LARGEST = tl.constexpr(8)
"""A query's largest number becomes 2^8 to 2^9."""

# $0, $1: cosine and sine of $2 * $3 + $4, a position times a frequency, and a phase. Each step of
# the angle is rounded, as in PyTorch. Two steps take whole turns from it (Cody and Waite, 1980).
_WAVE = (
    "{ .reg .f32 a, n; mul.rn.f32 a, $2, $3; add.rn.f32 a, a, $4;"
    " mul.rn.f32 n, a, 0f3E22F983; cvt.rni.f32.f32 n, n;"
    " fma.rn.f32 a, n, 0fC0C90FDB, a; fma.rn.f32 a, n, 0f343BBD2E, a;"
    " cos.approx.ftz.f32 $0, a; sin.approx.ftz.f32 $1, a; }"
)
ASM_WAVE = tl.constexpr(_WAVE)


@triton.jit
def waves_at(positions, frequency, phase, ASM: tl.constexpr):
    """Cosine and sine, ``[tokens, channels]``, of ``positions * frequency + phase``."""
    if ASM:
        return tl.inline_asm_elementwise(
            ASM_WAVE, "=f,=f,f,f,f", [positions[:, None], frequency[None, :], phase[None, :]],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        angles = positions[:, None] * frequency[None, :] + phase[None, :]
        return tl.cos(angles), tl.sin(angles)


@triton.jit
def pair_channels(
    pair, DK: tl.constexpr, KROT: tl.constexpr, KINTER: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """First and second channel of each of HALF pairs; DK or more where there is none.

    KROT: rotated channels. KINTER: pairs are neighbours, not halves. The channels behind them are
    paired as halves.
    """
    PAIRS: tl.constexpr = KROT // 2
    REST: tl.constexpr = (DK - KROT + 1) // 2
    if KINTER:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + PAIRS
    if REST:
        first = tl.where(pair < PAIRS, first, pair + PAIRS)
        second = tl.where(pair < PAIRS, second, pair + PAIRS + REST)
    if HALF > PAIRS + REST:
        first = tl.where(pair < PAIRS + REST, first, DK)
    return first, second


@triton.jit
def _load_part(x, rows, some, channels, DK: tl.constexpr, ROW: tl.constexpr):
    """Some rows and channels of ``synthesis``."""
    return tl.load(
        x + rows[:, None] * ROW + channels[None, :],
        mask=some[:, None] & (channels < DK)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def _load_tile(
    synthesis, units, span, CODE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, W8: tl.constexpr, W4: tl.constexpr, W2: tl.constexpr,
    DK: tl.constexpr, ROW: tl.constexpr, KROT: tl.constexpr, KINTER: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """The basis of one code of each word of a run, ``[PAD / 2, 2 HALF]``, pairs side by side."""
    word = tl.arange(0, PAD // 2)
    some = word < WIDTH // 2
    w = component(START + CODE * (WIDTH // 2) + word, W8, W4, W2)
    first, second = pair_channels(tl.arange(0, HALF), DK, KROT, KINTER, HALF)
    one = _load_part(synthesis, w, some, first, DK, ROW)
    other = _load_part(synthesis, w, some, second, DK, ROW)
    both = tl.reshape(tl.join(one, other), (PAD // 2, 2 * HALF))
    # Behind the reshape, which Triton would move into shared memory, where it is not allowed.
    unit = tl.load(units + w, mask=some, other=0.0) * span
    return (both.to(tl.float32) * unit[:, None]).to(tl.float16)


@triton.jit
def _sum_of(tile):
    return tl.sum(tile.to(tl.float32), 0)


@triton.jit
def load_basis(
    x, u, span, W8: tl.constexpr, W4: tl.constexpr, W2: tl.constexpr,
    P8: tl.constexpr, P4: tl.constexpr, P2: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr,
    R: tl.constexpr, NEXT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The basis as tiles by code, 0.0 where there is no run; and what they have too much of.

    x: ``synthesis`` of the head, a row of ROW numbers for each component. u: units. R: rotated
    channels. NEXT: pairs are neighbours.
    """
    at: tl.constexpr = W8 + 2 * W4
    b8_0, b8_1, b4_0, b4_1, b4_2, b4_3 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    b2_0, b2_1, b2_2, b2_3, b2_4, b2_5, b2_6, b2_7 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    excess = tl.full([2 * HALF], 0.0, tl.float32)
    if W8:
        b8_0 = _load_tile(x, u, span, 0, 0, W8, P8, W8, W4, W2, D, ROW, R, NEXT, HALF)
        b8_1 = _load_tile(x, u, span, 1, 0, W8, P8, W8, W4, W2, D, ROW, R, NEXT, HALF)
        excess += OFFSET_8 * (_sum_of(b8_0) + _sum_of(b8_1))
    if W4:
        b4_0 = _load_tile(x, u, span, 0, W8, W4, P4, W8, W4, W2, D, ROW, R, NEXT, HALF)
        b4_1 = _load_tile(x, u, span, 1, W8, W4, P4, W8, W4, W2, D, ROW, R, NEXT, HALF)
        b4_2 = _load_tile(x, u, span, 2, W8, W4, P4, W8, W4, W2, D, ROW, R, NEXT, HALF)
        b4_3 = _load_tile(x, u, span, 3, W8, W4, P4, W8, W4, W2, D, ROW, R, NEXT, HALF)
        excess += OFFSET * (_sum_of(b4_0) + _sum_of(b4_1) + _sum_of(b4_2) + _sum_of(b4_3))
    if W2:
        b2_0 = _load_tile(x, u, span, 0, at, W2, P2, W8, W4, W2, D, ROW, R, NEXT, HALF)
        b2_1 = _load_tile(x, u, span, 1, at, W2, P2, W8, W4, W2, D, ROW, R, NEXT, HALF)
        b2_2 = _load_tile(x, u, span, 2, at, W2, P2, W8, W4, W2, D, ROW, R, NEXT, HALF)
        b2_3 = _load_tile(x, u, span, 3, at, W2, P2, W8, W4, W2, D, ROW, R, NEXT, HALF)
        b2_4 = _load_tile(x, u, span, 4, at, W2, P2, W8, W4, W2, D, ROW, R, NEXT, HALF)
        b2_5 = _load_tile(x, u, span, 5, at, W2, P2, W8, W4, W2, D, ROW, R, NEXT, HALF)
        b2_6 = _load_tile(x, u, span, 6, at, W2, P2, W8, W4, W2, D, ROW, R, NEXT, HALF)
        b2_7 = _load_tile(x, u, span, 7, at, W2, P2, W8, W4, W2, D, ROW, R, NEXT, HALF)
        excess += OFFSET * (_sum_of(b2_0) + _sum_of(b2_1) + _sum_of(b2_2) + _sum_of(b2_3))
        excess += OFFSET * (_sum_of(b2_4) + _sum_of(b2_5) + _sum_of(b2_6) + _sum_of(b2_7))
    tiles = (
        b8_0, b8_1, b4_0, b4_1, b4_2, b4_3, b2_0, b2_1, b2_2, b2_3, b2_4, b2_5, b2_6, b2_7,
    )  # fmt: skip
    return tiles, excess


@triton.jit
def load_turn(
    h, scale2, q_rows, some, mean, synthesis, units, spans, waves,
    H: tl.constexpr, KG: tl.constexpr, DK: tl.constexpr, KW: tl.constexpr,
    K8: tl.constexpr, K4: tl.constexpr, K2: tl.constexpr,
    KP8: tl.constexpr, KP4: tl.constexpr, KP2: tl.constexpr, KGAIN: tl.constexpr,
    KROT: tl.constexpr, KINTER: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """What :func:`turned_scores` needs of one KV head, in its order.

    The basis; what is taken from rebuilt numbers before the gain, and added behind it; frequencies
    and phases, which both channels of a pair share; queries, and the factor of their products with
    keys.

    q_rows: the address of each query row.
    """
    row: tl.constexpr = H // KG * DK
    gk = h // (H // KG)
    own = h % (H // KG) * DK
    span = tl.load(spans) * LOWER
    tiles, excess = load_basis(
        synthesis + gk.to(tl.int64) * (KW * row) + own, units + (KG + gk) * KW, span,
        K8, K4, K2, KP8, KP4, KP2, DK, row, KROT, KINTER, HALF,
    )  # fmt: skip
    i = tl.arange(0, 2 * HALF)
    first, second = pair_channels(i // 2, DK, KROT, KINTER, HALF)
    channel = tl.where(i % 2 == 0, first, second)
    there = channel < DK
    add = tl.load(mean + gk * row + own + channel, mask=there, other=0.0) * span
    if not KGAIN:
        add -= excess
    pair = tl.arange(0, HALF)
    first, second = pair_channels(pair, DK, KROT, KINTER, HALF)
    frequency = tl.load(waves + first, mask=pair < KROT // 2, other=0.0)
    phase = tl.load(waves + KROT + first, mask=pair < KROT // 2, other=0.0)
    x = tl.load(
        q_rows[None, :] + channel[:, None], mask=some[None, :] & there[:, None], other=0.0
    ).to(tl.float32)  # [2 HALF, rows]
    exponent = (tl.max(tl.abs(x), 0).to(tl.int32, bitcast=True) >> 23) - 127 - LARGEST
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    into = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    back = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    return (
        tiles, excess, add, frequency, phase,
        (x * into[None, :]).to(tl.float16), back * (scale2 / span),
    )  # fmt: skip


@triton.jit
def turned_scores(
    turn, base, k_gains, tokens, live, origin,
    TILE: tl.constexpr, HALF: tl.constexpr, PITCH: tl.constexpr,
    W8: tl.constexpr, W4: tl.constexpr, W2: tl.constexpr,
    P8: tl.constexpr, P4: tl.constexpr, P2: tl.constexpr, KGAIN: tl.constexpr,
    ALL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Scores of coded tokens in units of log2, ``[TILE, rows]``.

    turn: of :func:`load_turn`. k_gains: gains of the tokens, float32, where there are any. origin:
    the token whose position is 0.
    """
    tiles, excess, add, frequency, phase, q16, factor = turn
    z = code_scores(
        tiles[0], tiles[1], tiles[2], tiles[3], tiles[4], tiles[5], tiles[6], tiles[7],
        tiles[8], tiles[9], tiles[10], tiles[11], tiles[12], tiles[13], base, tokens, live,
        2 * HALF, TILE, PITCH, W8, W4, W2, P8, P4, P2, ALL, ASM,
    )  # fmt: skip
    if KGAIN:
        z = (z - excess[None, :]) * k_gains[:, None]
    z += add[None, :]
    z1, z2 = tl.split(tl.reshape(z, (TILE, HALF, 2)))
    cos, sin = waves_at((tokens - origin).to(tl.float32), frequency, phase, ASM)
    k = tl.join(z1 * cos - z2 * sin, z2 * cos + z1 * sin)
    k = tl.reshape(k, (TILE, 2 * HALF)).to(tl.float16)
    return tl.dot(k, q16) * factor[None, :]
