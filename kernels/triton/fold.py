"""Queries into the space of the codes of the keys, before the kernel over tokens."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold_kernel(
    q, mean, synthesis, q16, shift, scale2, batch,
    H: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, STRIDE: tl.constexpr, KG: tl.constexpr,
    DK: tl.constexpr, DKP: tl.constexpr, KW: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """``q16 [B, G, STRIDE, KW]`` float16, and the scores of the mean, ``shift [B, G, STRIDE]``.

    With codes centred to ``u - 2^(b-1)``, ``u + c`` is them plus 1/2 in every class, so that

        log2(e) scale q . x  =  t (q16 . codes + sum(q16) / 2) + shift

    A program takes X rows of one head, of several sequences if need be.
    """
    chunk = tl.program_id(0) % CHUNKS
    h = tl.program_id(0) // CHUNKS % H
    i = tl.program_id(0) // (CHUNKS * H) * X + tl.arange(0, X)
    some = i < batch * ROWS
    b, r = (i // ROWS).to(tl.int64), i % ROWS
    d = tl.arange(0, DKP)
    w = chunk * CHUNK + tl.arange(0, CHUNK)
    n: tl.constexpr = H // KG * DK  # channels of a group of the code
    own = h % (H // KG) * DK
    first = (h // (H // KG)).to(tl.int64) * KW * n + own
    basis = tl.load(
        synthesis + first + w[None, :] * n + d[:, None],
        mask=(w < KW)[None, :] & (d < DK)[:, None], other=0.0,
    )  # [DKP, CHUNK]  # fmt: skip
    x = tl.load(
        q + ((b * H + h) * ROWS + r)[:, None] * DK + d[None, :],
        mask=some[:, None] & (d < DK)[None, :], other=0.0,
    ).to(tl.float32)  # [X, DKP]  # fmt: skip
    scale2 = tl.full([], scale2, tl.float32)  # Inductor passes float64
    folded = tl.dot(x, basis, input_precision="tf32x3") * scale2
    rows = (b * G + h // (H // G)) * STRIDE + h % (H // G) * ROWS + r
    tl.store(
        q16 + rows[:, None] * KW + w[None, :], folded.to(tl.float16),
        mask=some[:, None] & (w < KW)[None, :],
    )  # fmt: skip
    if chunk == 0:
        mu = tl.load(mean + h // (H // KG) * n + own + d, mask=d < DK, other=0.0)
        tl.store(shift + rows, tl.sum(x * mu[None, :], 1) * scale2, mask=some)
