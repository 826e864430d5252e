"""The ring of one KV head: the most recent tokens, exact."""

from __future__ import annotations

import triton
import triton.language as tl

from .score import LIFT, biased, capped, exp2, product


@triton.jit
def over_ring(
    work, splits, q, bias, lengths, k_ring, v_ring, stats, exact,
    capacity, bias_b, bias_h, bias_q, scale2,
    H: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    BLOCKS: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    RING: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, X: tl.constexpr,
    XBLOCKS: tl.constexpr, XN: tl.constexpr, EXACTS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """X rows of one head: the last of ``exact [B, H, ROWS, EXACTS, DV]`` and slot."""
    block = work % XBLOCKS
    h = work // XBLOCKS % H
    b = work // (XBLOCKS * H)
    head = (b * H + h).to(tl.int64)
    recent = tl.load(lengths + 1).to(tl.int32)

    r = block * X + tl.arange(0, X)  # of the head's
    mine = r < ROWS
    d, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    qx = tl.load(
        q + (head * ROWS + r)[None, :] * DK + d[:, None],
        mask=mine[None, :] & (d < DK)[:, None], other=0.0,
    )  # [DKP, X]  # fmt: skip
    real = tl.where(mine, r, 0)  # rows that are none read the mask of one that is
    rows_bias = (h * (ROWS // Q) + real // Q) * bias_h + real % Q * bias_q
    bias_row = bias + b.to(tl.int64) * bias_b

    top = tl.full([X], -float("inf"), tl.float32)
    mass = tl.full([X], 0.0, tl.float32)
    acc = tl.full([DVP, X], 0.0, tl.float32)
    for start in tl.range(0, recent, XN, num_stages=2):
        n = start + tl.arange(0, XN)
        live = n < recent
        cell = head * RING + n
        k = tl.load(
            k_ring + cell[:, None] * DK + d[None, :],
            mask=live[:, None] & (d < DK)[None, :], other=0.0,
        )  # [XN, DKP]  # fmt: skip
        s = product(k, qx, tl.full([XN, X], 0.0, tl.float32), ASM) * scale2
        if CAP > 0:
            s = capped(s, CAP, ASM)
        s = biased(s, bias_row, capacity + n, live, rows_bias, BIAS)
        new = tl.maximum(top, tl.max(s, 0))
        base = tl.where(new == -float("inf"), 0.0, new)
        decay = exp2(top - base, ASM)
        p = exp2(s - (base - LIFT)[None, :], ASM)
        top = new
        mass = mass * decay + tl.sum(p, 0)
        v = tl.load(
            v_ring + cell[None, :] * DV + dv[:, None],
            mask=live[None, :] & (dv < DV)[:, None], other=0.0,
        )  # [DVP, XN]  # fmt: skip
        acc = product(v, p.to(v.dtype), acc * decay[None, :], ASM)

    g = h // (H // G)
    row = h % (H // G) * ROWS + r  # among those of its group
    STRIDE: tl.constexpr = BLOCKS * M
    slot = (b * G + g).to(tl.int64) * (splits + EXACTS) + splits + EXACTS - 1
    at_stats = stats + slot * (4 * STRIDE) + row
    tl.store(at_stats, top - LIFT, mask=mine)
    tl.store(at_stats + STRIDE, mass, mask=mine)
    tl.store(at_stats + 2 * STRIDE, tl.zeros_like(mass), mask=mine)
    tl.store(at_stats + 3 * STRIDE, tl.zeros_like(mass), mask=mine)
    where = exact + ((head * ROWS + r) * EXACTS + EXACTS - 1)[None, :] * DV + dv[:, None]
    tl.store(where, acc, mask=mine[None, :] & (dv < DV)[:, None])
