"""Splits of one step put together, and values out of the space of their codes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum_slots(
    part, stats, top, base, slots, rows, some, columns,
    STRIDE: tl.constexpr, VW: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Columns of the weighted sums, summed over slots: ``[rows, columns]``."""
    i = tl.arange(0, AT_ONCE)
    mask = some[:, None] & (columns < VW)[None, :]
    total = tl.where(mask, 0.0, 0.0)
    for slot in tl.range(0, slots, AT_ONCE):
        at = base + (slot + i)[:, None] * STRIDE + rows[None, :]  # [AT_ONCE, rows]
        live = (slot + i < slots)[:, None] & some[None, :]
        factor = tl.exp2(tl.load(stats + at * 4, mask=live, other=-float("inf")) - top[None, :])
        x = tl.load(
            part + at[:, :, None] * VW + columns[None, None, :],
            mask=live[:, :, None] & (columns < VW)[None, None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(factor[:, :, None] * x, 0)
    return total


@triton.jit
def merge_kernel(
    part, stats, exact, mean, synthesis, out, splits,
    H: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, STRIDE: tl.constexpr, VG: tl.constexpr,
    VX: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, VW: tl.constexpr,
    POOLED: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr, AT_ONCE: tl.constexpr,
    X: tl.constexpr, XBLOCKS: tl.constexpr,
):  # fmt: skip
    """``out [B, H, ROWS, DV]`` of what ``attend_kernel`` left.

    With f = 2^(m_split - m), and masses and sums relative to it,

        out = (exact + (sums + gained / 2) synthesis + mass of coded values * mean) / mass
    """
    block = tl.program_id(0) % XBLOCKS
    h = tl.program_id(0) // XBLOCKS % H
    b = tl.program_id(0) // (XBLOCKS * H)
    r = block * X + tl.arange(0, X)
    some = r < ROWS
    g = h // (H // G)
    rows = h % (H // G) * ROWS + r
    base = (b * G + g).to(tl.int64) * (splits + 1) * STRIDE

    slot = tl.arange(0, SLOTS)
    at = (base + slot[None, :] * STRIDE + rows[:, None]) * 4
    mask = some[:, None] & (slot <= splits)[None, :]
    m = tl.load(stats + at, mask=mask, other=-float("inf"))  # [X, SLOTS]
    top = tl.max(m, 1)
    top = tl.where(top == -float("inf"), 0.0, top)
    f = tl.exp2(m - top[:, None])
    mass = tl.sum(f * tl.load(stats + at + 1, mask=mask, other=0.0), 1)
    coded_mass = tl.sum(f * tl.load(stats + at + 2, mask=mask, other=0.0), 1)
    gained = tl.sum(f * tl.load(stats + at + 3, mask=mask, other=0.0), 1)

    head = (b * H + h).to(tl.int64)
    d = tl.arange(0, DVP)
    inside = some[:, None] & (d < DV)[None, :]
    where = (head * ROWS + r)[:, None] * DV + d[None, :]
    last = tl.load(stats + (base + splits * STRIDE + rows) * 4, mask=some, other=-float("inf"))
    acc = tl.load(exact + where, mask=inside, other=0.0) * tl.exp2(last - top)[:, None]
    if VX:
        acc += _sum_slots(part, stats, top, base, splits, rows, some, d, STRIDE, VW, AT_ONCE)
    else:
        slots = splits
        if POOLED:
            slots = splits + 1
        n: tl.constexpr = H // VG * DV
        own = h % (H // VG) * DV
        first = synthesis + (h // (H // VG)).to(tl.int64) * VW * n + own
        for start in tl.static_range(0, VW, CHUNK):
            w = start + tl.arange(0, CHUNK)
            basis = tl.load(
                first + w[:, None] * n + d[None, :],
                mask=(w < VW)[:, None] & (d < DV)[None, :], other=0.0,
            )  # [CHUNK, DVP]  # fmt: skip
            x = _sum_slots(part, stats, top, base, slots, rows, some, w, STRIDE, VW, AT_ONCE)
            acc = tl.dot(x + 0.5 * gained[:, None], basis, acc, input_precision="tf32x3")
        mu = tl.load(mean + h // (H // VG) * n + own + d, mask=d < DV, other=0.0)
        acc += coded_mass[:, None] * mu[None, :]
    acc = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=inside)
