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

from .codes import component, offset
from .score import code_scores, load_queries

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
def channel_at(
    i, DK: tl.constexpr, KROT: tl.constexpr, KINTER: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The channel at place i, pairs side by side."""
    first, second = pair_channels(i // 2, DK, KROT, KINTER, HALF)
    return tl.where(i % 2 == 0, first, second)


@triton.jit
def basis_kernel(
    mean, synthesis, units, spans, basis16, offsets,
    H: tl.constexpr, KG: tl.constexpr, DK: tl.constexpr, KW: tl.constexpr,
    K8: tl.constexpr, K4: tl.constexpr, K2: tl.constexpr, KGAIN: tl.constexpr,
    KROT: tl.constexpr, KINTER: tl.constexpr, HALF: tl.constexpr,
    CHUNK: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The basis of each head as :func:`load_turn` reads it, before the kernel over tokens.

    Leaves ``basis16 [H, 2 HALF, KW]`` float16, channels in pairs and components in the order of
    codes, and ``offsets [H, 2, 2 HALF]``: what codes have too much, which is taken from rebuilt
    numbers before the gain, and what is added behind it.
    """
    part = tl.program_id(0) % PARTS
    h = tl.program_id(0) // PARTS
    i = part * COLUMNS + tl.arange(0, COLUMNS)
    channel = channel_at(i, DK, KROT, KINTER, HALF)
    there = channel < DK
    row: tl.constexpr = H // KG * DK
    gk = (h // (H // KG)).to(tl.int64)
    own = h % (H // KG) * DK
    span = tl.load(spans) * LOWER
    excess = tl.full([COLUMNS], 0.0, tl.float32)
    for start in tl.range(0, KW, CHUNK, num_stages=3):
        number = start + tl.arange(0, CHUNK)
        held = number < KW
        w = component(number, K8, K4, K2)
        unit = tl.load(units + (KG + gk) * KW + w, mask=held, other=0.0) * span
        x = tl.load(
            synthesis + gk * (KW * row) + own + w[:, None] * row + channel[None, :],
            mask=held[:, None] & there[None, :], other=0.0,
        )  # [CHUNK, COLUMNS]  # fmt: skip
        x16 = (x.to(tl.float32) * unit[:, None]).to(tl.float16)
        where = basis16 + (h * (2 * HALF) + i)[None, :] * KW + number[:, None]
        tl.store(where, x16, mask=held[:, None])
        too_much = offset(number, K8, K4)
        excess += tl.sum(x16.to(tl.float32) * too_much[:, None], 0)
    add = tl.load(mean + gk * row + own + channel, mask=there, other=0.0) * span
    if not KGAIN:
        add -= excess
    at = offsets + h * (4 * HALF) + i
    tl.store(at, excess)
    tl.store(at + 2 * HALF, add)


@triton.jit
def load_turn(
    h, scale2, q_rows, some, basis16, offsets, spans, waves,
    DK: tl.constexpr, KW: tl.constexpr, K8: tl.constexpr, K4: tl.constexpr, K2: tl.constexpr,
    KP8: tl.constexpr, KP4: tl.constexpr, KP2: tl.constexpr,
    KROT: tl.constexpr, KINTER: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """What :func:`turned_scores` needs of one KV head, in its order.

    The basis, whose columns take the place of queries; what is taken from rebuilt numbers before
    the gain, and added behind it; frequencies and phases, which both channels of a pair share;
    queries, and the factor of their products with keys.

    q_rows: the address of each query row.
    """
    i = tl.arange(0, 2 * HALF)
    basis = load_queries(
        basis16 + h.to(tl.int64) * (2 * HALF * KW), i, i >= 0, K8, K4, K2, KP8, KP4, KP2, KW
    )
    at = offsets + h * (4 * HALF) + i
    excess, add = tl.load(at), tl.load(at + 2 * HALF)
    channel = channel_at(i, DK, KROT, KINTER, HALF)
    there = channel < DK
    pair = tl.arange(0, HALF)
    first, _ = pair_channels(pair, DK, KROT, KINTER, HALF)
    frequency = tl.load(waves + first, mask=pair < KROT // 2, other=0.0)
    phase = tl.load(waves + KROT + first, mask=pair < KROT // 2, other=0.0)
    x = tl.load(
        q_rows[None, :] + channel[:, None], mask=some[None, :] & there[:, None], other=0.0
    ).to(tl.float32)  # [2 HALF, rows]
    exponent = (tl.max(tl.abs(x), 0).to(tl.int32, bitcast=True) >> 23) - 127 - LARGEST
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    into = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    back = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    factor = back * (scale2 / (tl.load(spans) * LOWER))
    return basis, excess, add, frequency, phase, (x * into[None, :]).to(tl.float16), factor


@triton.jit
def turned_scores(
    turn, base, k_gains, rows, tokens, live, origin,
    TILE: tl.constexpr, HALF: tl.constexpr, PITCH: tl.constexpr,
    W8: tl.constexpr, W4: tl.constexpr, W2: tl.constexpr,
    P8: tl.constexpr, P4: tl.constexpr, P2: tl.constexpr, KGAIN: tl.constexpr,
    ALL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Scores of coded tokens in units of log2, ``[TILE, rows]``.

    turn: of :func:`load_turn`. k_gains: gains of the tokens, float32, where there are any. rows:
    where their codes are. origin: the token whose position is 0.
    """
    basis, excess, add, frequency, phase, q16, factor = turn
    z = code_scores(
        basis[0], basis[1], basis[2], basis[3], basis[4], basis[5], basis[6], basis[7],
        basis[8], basis[9], basis[10], basis[11], basis[12], basis[13], base, rows, live,
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
