"""Splits of one step put together, and values out of the space of their codes.

Two launches: ``sum_kernel`` adds up what the splits left, row by row, with all splits of a row in
flight at once; ``expand_kernel`` is one small matrix product a head.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_kernel(
    part, stats, sums, masses, splits,
    G: tl.constexpr, STRIDE: tl.constexpr, VX: tl.constexpr, VW: tl.constexpr,
    POOLED: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Weighted sums ``[B, G, STRIDE, VW]`` over all splits, and the row's ``masses [..., 4]``.

    Relative to the largest score m of the row: the mass of all tokens, that of tokens whose values
    are coded, that of them with gains, and the factor 2^(m_exact - m) of what ring and pool left.
    """
    chunk = tl.program_id(0) % CHUNKS
    row = tl.program_id(0) // CHUNKS
    base = (row // STRIDE).to(tl.int64) * (splits + 1) * STRIDE + row % STRIDE
    slot = tl.arange(0, SLOTS)
    at = base + slot * STRIDE
    live = slot <= splits
    m = tl.load(stats + at * 4, mask=live, other=-float("inf"))
    top = tl.max(m, 0)
    f = tl.exp2(m - tl.where(top == -float("inf"), 0.0, top))
    if chunk == 0:
        out = masses + row.to(tl.int64) * 4
        for i in tl.static_range(1, 4):
            mass = tl.load(stats + at * 4 + i, mask=live, other=0.0)
            tl.store(out + i - 1, tl.sum(f * mass, 0))
        tl.store(out + 3, tl.sum(tl.where(slot == splits, f, 0.0), 0))
    column = chunk * COLUMNS + tl.arange(0, COLUMNS)
    if VX or not POOLED:
        live = slot < splits  # programs over ring and pool leave no sums of codes
    x = tl.load(
        part + at[:, None] * VW + column[None, :],
        mask=live[:, None] & (column < VW)[None, :], other=0.0,
    )  # [SLOTS, COLUMNS]  # fmt: skip
    total = tl.sum(tl.where(live, f, 0.0)[:, None] * x, 0)
    tl.store(sums + row.to(tl.int64) * VW + column, total, mask=column < VW)


@triton.jit
def expand_kernel(
    sums, masses, exact, mean, synthesis, out, batch,
    H: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, STRIDE: tl.constexpr, VG: tl.constexpr,
    VX: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, VW: tl.constexpr,
    CHUNK: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """``out [B, H, ROWS, DV]``, for X rows of one head, of several sequences if need be.

    out = (f exact + (sums + gained / 2) synthesis + mass of coded values * mean) / mass
    """
    h = tl.program_id(0) % H
    i = tl.program_id(0) // H * X + tl.arange(0, X)
    some = i < batch * ROWS
    b, r = (i // ROWS).to(tl.int64), i % ROWS
    rows = (b * G + h // (H // G)) * STRIDE + h % (H // G) * ROWS + r
    mass = tl.load(masses + rows * 4, mask=some, other=1.0)
    coded_mass = tl.load(masses + rows * 4 + 1, mask=some, other=0.0)
    gained = tl.load(masses + rows * 4 + 2, mask=some, other=0.0)
    factor = tl.load(masses + rows * 4 + 3, mask=some, other=0.0)
    d = tl.arange(0, DVP)
    inside = some[:, None] & (d < DV)[None, :]
    where = ((b * H + h) * ROWS + r)[:, None] * DV + d[None, :]
    acc = tl.load(exact + where, mask=inside, other=0.0) * factor[:, None]
    if VX:
        acc += tl.load(sums + rows[:, None] * VW + d[None, :], mask=inside, other=0.0)
    else:
        n: tl.constexpr = H // VG * DV
        own = h % (H // VG) * DV
        first = synthesis + (h // (H // VG)).to(tl.int64) * VW * n + own
        for start in tl.range(0, VW, CHUNK):
            w = start + tl.arange(0, CHUNK)
            basis = tl.load(
                first + w[:, None] * n + d[None, :],
                mask=(w < VW)[:, None] & (d < DV)[None, :], other=0.0,
            )  # [CHUNK, DVP]  # fmt: skip
            x = tl.load(
                sums + rows[:, None] * VW + w[None, :],
                mask=some[:, None] & (w < VW)[None, :], other=0.0,
            )  # [X, CHUNK]  # fmt: skip
            acc = tl.dot(x + 0.5 * gained[:, None], basis, acc, input_precision="tf32x3")
        mu = tl.load(mean + h // (H // VG) * n + own + d, mask=d < DV, other=0.0)
        acc += coded_mass[:, None] * mu[None, :]
    acc = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=inside)
