"""Queries into the space of the codes of the keys, before the kernel over tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import component, offset

LARGEST = tl.constexpr(65504.0)


@triton.jit
def half(x):
    """Float32 numbers that were bfloat16 or float16, as float16: exact from 2^-14 to 2^16.

    Larger ones become the largest of float16, which is far beyond what a softmax tells apart.
    """
    x = tl.minimum(x, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    x = tl.maximum(x, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return x.to(tl.float16)


@triton.jit
def fold_kernel(
    q, mean, synthesis, units, q16, shift, centre, table, scale2, batch,
    H: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, STRIDE: tl.constexpr, KG: tl.constexpr,
    DK: tl.constexpr, DKP: tl.constexpr, KW: tl.constexpr,
    K8: tl.constexpr, K4: tl.constexpr, K2: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, X: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """``q16 [B, G, STRIDE, KW]`` float16, in the order of codes; what is added to scores.

    Scores of the mean, ``shift [B, G, STRIDE]``, and of what codes have too much,
    ``centre [B, G, CHUNKS, STRIDE]``, so that with codes as ``converted`` gives them

        log2(e) scale q . x  =  t (q16 . codes + sum of centre) + shift

    A program takes X rows of one head, of several sequences if need be. Also 0 .. STEPS - 1 into
    ``table``, which ``over_codes`` wants to read.
    """
    if tl.program_id(0) == 0:
        tl.store(table + tl.arange(0, STEPS), tl.arange(0, STEPS))
    chunk = tl.program_id(0) % CHUNKS
    h = tl.program_id(0) // CHUNKS % H
    i = tl.program_id(0) // (CHUNKS * H) * X + tl.arange(0, X)
    some = i < batch * ROWS
    b, r = (i // ROWS).to(tl.int64), i % ROWS
    d = tl.arange(0, DKP)
    number = chunk * CHUNK + tl.arange(0, CHUNK)
    held = number < KW
    w = component(number, K8, K4, K2)
    unit = tl.load(units + (KG + h // (H // KG)) * KW + w, mask=held, other=0.0)
    n: tl.constexpr = H // KG * DK  # channels of a group of the code
    own = h % (H // KG) * DK
    first = (h // (H // KG)).to(tl.int64) * KW * n + own
    basis = tl.load(
        synthesis + first + w[None, :] * n + d[:, None],
        mask=held[None, :] & (d < DK)[:, None], other=0.0,
    )  # [DKP, CHUNK]  # fmt: skip
    x = tl.load(
        q + ((b * H + h) * ROWS + r)[:, None] * DK + d[None, :],
        mask=some[:, None] & (d < DK)[None, :], other=0.0,
    ).to(tl.float32)  # [X, DKP]  # fmt: skip
    scale2 = tl.full([], scale2, tl.float32)  # Inductor passes float64
    folded = tl.dot(half(x), basis) * (unit * scale2)[None, :]
    folded = folded.to(tl.float16)
    group = b * G + h // (H // G)
    row = h % (H // G) * ROWS + r
    tl.store(
        q16 + (group * STRIDE + row)[:, None] * KW + number[None, :], folded,
        mask=some[:, None] & held[None, :],
    )  # fmt: skip
    too_much = offset(number, K8, K4)
    sums = tl.sum(folded.to(tl.float32) * too_much[None, :], 1)  # 0 behind the last component
    tl.store(centre + (group * CHUNKS + chunk) * STRIDE + row, -sums, mask=some)
    if chunk == 0:
        mu = tl.load(mean + h // (H // KG) * n + own + d, mask=d < DK, other=0.0)
        tl.store(shift + group * STRIDE + row, tl.sum(x * mu[None, :], 1) * scale2, mask=some)
