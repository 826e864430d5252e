"""Tokens into codes: project, find the gain, round, pack, and judge, in one launch.

Bases are float16 (``codec/half.py``). A token in float32 is the sum of two float16 numbers, to 22
bits, so that two float16 products give what one in float32 would.

The maths is that of ``TransformLayout.encode_and_judge``. Byte i of a run of b-bit codes holds
``8 / b`` components that lie a run's bytes apart, so each of them has an accumulator of its own
and bytes are put together in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .turned import waves_at


@triton.jit
def _weights(base, rows, inside, START: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr,
             RANK: tl.constexpr):  # fmt: skip
    """Columns ``START .. START + WIDTH`` of some rows of ``analysis``, 0 behind them."""
    c = tl.arange(0, PAD)
    where = base + rows[:, None] * RANK + START + c[None, :]
    return tl.load(where, mask=inside[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def _columns(base, START: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """The same part of a row of numbers, one for each component."""
    c = tl.arange(0, PAD)
    return tl.load(base + START + c, mask=c < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _turned_back(
    t, row, d, live, positions, waves, R: tl.constexpr, NEXT: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """Channels ``d`` of tokens, ``t [tokens, d]``, as they were before their rotation.

    row: the addresses of the tokens, where the other channels of the pairs are read; numbers that
    are not finite count as 0. R: rotated channels. NEXT: pairs are neighbours, not halves.
    """
    if NEXT:
        is_first, distance = d % 2 == 0, 1
    else:
        is_first, distance = d < R // 2, R // 2
    other = tl.where(is_first, d + distance, d - distance)
    rotated = d < R
    x = tl.load(row + other[None, :], mask=live[:, None] & rotated[None, :], other=0.0)
    x = x.to(tl.float32)
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    frequency = tl.load(waves + d, mask=rotated, other=0.0)
    phase = tl.load(waves + R + d, mask=rotated, other=0.0)
    cos, sin = waves_at(positions, frequency, phase, ASM)
    return t * cos + x * tl.where(is_first[None, :], sin, -sin)


@triton.jit
def _project(high, low, w, acc):
    """``acc + (high + low) w`` of float16 operands.

    Tensor cores cut sums off where they round elsewhere, so only these few terms are theirs to add.
    """
    return acc + tl.dot(high, w, tl.dot(low, w))


@triton.jit
def _measure(y, white, sums, GAIN: tl.constexpr):
    """What the gain is made of: the sum of squares (1), or the largest magnitude (2)."""
    if GAIN == 1:
        return sums + tl.sum(y * white * y * white, 1)
    else:
        return tl.maximum(sums, tl.max(tl.abs(y * white), 1))


@triton.jit
def _round(y, gain, scales, stored, wrong, BITS: tl.constexpr):
    """Codes of one part of a run, and with it the squares that are stored, and of the errors."""
    half: tl.constexpr = 1 << (BITS - 1)
    codes = tl.floor(y / gain[:, None]) + half
    codes = tl.minimum(tl.maximum(codes, 0.0), 2.0 * half - 1.0)
    left = (y - (codes + (0.5 - half)) * gain[:, None]) * scales
    kept = y * scales
    stored += tl.sum(kept * kept, 1)
    wrong += tl.sum(left * left, 1)
    return codes.to(tl.int32), stored, wrong


@triton.jit
def _store(base, tokens, live, packed, START: tl.constexpr, WIDTH: tl.constexpr,
           PAD: tl.constexpr, PITCH: tl.constexpr):  # fmt: skip
    c = tl.arange(0, PAD)
    where = base + tokens[:, None] * PITCH + START + c[None, :]
    tl.store(where, packed.to(tl.uint8), mask=live[:, None] & (c < WIDTH)[None, :])


@triton.jit(do_not_specialize=["tokens", "capacity", "batch"])
def encode_kernel(
    x, mean, analysis, units, whiten, metric, scales, spans, codes, gains, judged,
    x_b, x_h, x_t, waves, origins, origin_b, begin, tokens, capacity, batch,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, RANK: tl.constexpr,
    R8: tl.constexpr, R4: tl.constexpr, R2: tl.constexpr,
    P8: tl.constexpr, P4: tl.constexpr, P2: tl.constexpr, GAIN: tl.constexpr,
    LEAST: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, NEXT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A tile of tokens of one group of heads, to places ``start ..`` of the payload.

    begin: where start is read from.

    ``judged [4, B, G, T]``: squares of size, stored components and errors (not yet those of
    components that are not stored), and how many numbers are not finite; they are coded as 0.

    R*: components of each width. P*: bytes of a tile of them. K: channels taken at a time. R:
    channels that are turned back by ``waves`` and the distance of a token from that of
    ``origins [B]``, neighbours with NEXT; 0: none.
    """
    start = tl.load(begin).to(tl.int32)
    group = tl.program_id(0) % (batch * G)
    n = tl.program_id(0) // (batch * G) * TILE + tl.arange(0, TILE)
    live = n < tokens
    b, g = (group // G).to(tl.int64), group % G
    HEADS: tl.constexpr = H // G
    W4: tl.constexpr = R4 // 2
    W2: tl.constexpr = R2 // 4
    at4: tl.constexpr = R8
    at2: tl.constexpr = R8 + R4

    if R8:
        y8 = tl.full([TILE, P8], 0.0, tl.float32)
    if R4:
        y4_0 = tl.full([TILE, P4], 0.0, tl.float32)
        y4_1 = y4_0
    if R2:
        y2_0 = tl.full([TILE, P2], 0.0, tl.float32)
        y2_1, y2_2, y2_3 = y2_0, y2_0, y2_0
    size = tl.full([TILE], 0.0, tl.float32)
    broken = tl.full([TILE], 0, tl.int32)
    e = tl.arange(0, DP)
    span = tl.load(spans)
    if R:
        positions = (start + n - tl.load(origins + b * origin_b).to(tl.int32)).to(tl.float32)
    for j in tl.range(0, HEADS):
        h = g * HEADS + j
        z = tl.full([TILE, DP], 0.0, tl.float32)
        for first in tl.range(0, DP, K):
            d = first + tl.arange(0, K)
            inside = d < D
            row = x + b * x_b + h.to(tl.int64) * x_h + n[:, None].to(tl.int64) * x_t
            t = tl.load(row + d[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            t = t.to(tl.float32)
            finite = tl.abs(t) < float("inf")
            broken += tl.sum((finite == 0).to(tl.int32), 1)
            mu = tl.load(mean + h * D + d, mask=inside, other=0.0).to(tl.float32)
            t = tl.where(finite, t, 0.0)
            if R:
                t = _turned_back(t, row, d, live, positions, waves, R, NEXT, ASM)
            t = (t - mu[None, :]) * span
            t = tl.minimum(tl.maximum(t, -65504.0), 65504.0)
            high = t.to(tl.float16)
            low = (t - high.to(tl.float32)).to(tl.float16)
            rows = j * D + d
            base = analysis + g * (HEADS * D * RANK)
            if R8:
                w = _weights(base, rows, inside, 0, R8, P8, RANK)
                y8 = _project(high, low, w, y8)
            if R4:
                w = _weights(base, rows, inside, at4, W4, P4, RANK)
                y4_0 = _project(high, low, w, y4_0)
                w = _weights(base, rows, inside, at4 + W4, W4, P4, RANK)
                y4_1 = _project(high, low, w, y4_1)
            if R2:
                w = _weights(base, rows, inside, at2, W2, P2, RANK)
                y2_0 = _project(high, low, w, y2_0)
                w = _weights(base, rows, inside, at2 + W2, W2, P2, RANK)
                y2_1 = _project(high, low, w, y2_1)
                w = _weights(base, rows, inside, at2 + 2 * W2, W2, P2, RANK)
                y2_2 = _project(high, low, w, y2_2)
                w = _weights(base, rows, inside, at2 + 3 * W2, W2, P2, RANK)
                y2_3 = _project(high, low, w, y2_3)
            w = tl.load(
                metric + h * (D * D) + d[:, None] * D + e[None, :],
                mask=inside[:, None] & (e < D)[None, :], other=0.0,
            )  # fmt: skip
            z = _project(high, low, w, z)
        size += tl.sum(z * z, 1)
    weight = tl.load(spans + 1)
    size *= weight * weight
    unit = units + g * RANK
    if R8:
        y8 *= _columns(unit, 0, R8, P8)
    if R4:
        y4_0 *= _columns(unit, at4, W4, P4)
        y4_1 *= _columns(unit, at4 + W4, W4, P4)
    if R2:
        y2_0 *= _columns(unit, at2, W2, P2)
        y2_1 *= _columns(unit, at2 + W2, W2, P2)
        y2_2 *= _columns(unit, at2 + 2 * W2, W2, P2)
        y2_3 *= _columns(unit, at2 + 3 * W2, W2, P2)

    gain = tl.full([TILE], 1.0, tl.float32)
    if GAIN:
        white = whiten + g * RANK
        sums = tl.full([TILE], 0.0, tl.float32)
        if R8:
            sums = _measure(y8, _columns(white, 0, R8, P8), sums, GAIN)
        if R4:
            sums = _measure(y4_0, _columns(white, at4, W4, P4), sums, GAIN)
            sums = _measure(y4_1, _columns(white, at4 + W4, W4, P4), sums, GAIN)
        if R2:
            sums = _measure(y2_0, _columns(white, at2, W2, P2), sums, GAIN)
            sums = _measure(y2_1, _columns(white, at2 + W2, W2, P2), sums, GAIN)
            sums = _measure(y2_2, _columns(white, at2 + 2 * W2, W2, P2), sums, GAIN)
            sums = _measure(y2_3, _columns(white, at2 + 3 * W2, W2, P2), sums, GAIN)
        if GAIN == 1:
            sums = tl.sqrt(sums / RANK)
        rounded = tl.minimum(tl.maximum(sums, LEAST), MOST).to(tl.float16)
        place = b * capacity + start + n
        tl.store(gains + place * G + g, rounded, mask=live)
        gain = rounded.to(tl.float32)

    scale = scales + g * RANK
    stored = tl.full([TILE], 0.0, tl.float32)
    wrong = tl.full([TILE], 0.0, tl.float32)
    BYTES: tl.constexpr = R8 + W4 + W2
    PITCH: tl.constexpr = G * BYTES
    out = codes + (b * capacity + start) * PITCH + g * BYTES
    if R8:
        u, stored, wrong = _round(y8, gain, _columns(scale, 0, R8, P8), stored, wrong, 8)
        _store(out, n, live, u, 0, R8, P8, PITCH)
    if R4:
        u, stored, wrong = _round(y4_0, gain, _columns(scale, at4, W4, P4), stored, wrong, 4)
        v, stored, wrong = _round(y4_1, gain, _columns(scale, at4 + W4, W4, P4), stored, wrong, 4)
        _store(out, n, live, u | (v << 4), R8, W4, P4, PITCH)
    if R2:
        u, stored, wrong = _round(y2_0, gain, _columns(scale, at2, W2, P2), stored, wrong, 2)
        v, stored, wrong = _round(y2_1, gain, _columns(scale, at2 + W2, W2, P2), stored, wrong, 2)
        u = u | (v << 2)
        s2 = _columns(scale, at2 + 2 * W2, W2, P2)
        v, stored, wrong = _round(y2_2, gain, s2, stored, wrong, 2)
        u = u | (v << 4)
        s3 = _columns(scale, at2 + 3 * W2, W2, P2)
        v, stored, wrong = _round(y2_3, gain, s3, stored, wrong, 2)
        _store(out, n, live, u | (v << 6), R8 + W4, W2, P2, PITCH)
    plane = (batch * G).to(tl.int64) * tokens
    told = judged + group.to(tl.int64) * tokens + n
    tl.store(told, size, mask=live)
    tl.store(told + plane, stored, mask=live)
    tl.store(told + 2 * plane, wrong, mask=live)
    tl.store(told + 3 * plane, broken.to(tl.float32), mask=live)
