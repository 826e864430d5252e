"""The ring of one KV head: the most recent tokens, exact."""

from __future__ import annotations

import triton
import triton.language as tl

from .exact_rows import load_rows, raised, store_rows
from .score import biased, capped, product


@triton.jit
def over_ring(
    work, splits, q, bias, lengths, k_ring, v_ring, stats, exact,
    capacity, bias_b, bias_h, bias_q, scale2,
    H: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    BLOCKS: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    RING: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, X: tl.constexpr,
    XBLOCKS: tl.constexpr, XN: tl.constexpr, STATS: tl.constexpr, EXACTS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """X rows of one head: the last of ``exact [B, H, ROWS, EXACTS, DV]`` and slot."""
    b, h, r, qx, bias_row, rows_bias = load_rows(
        work, q, bias, bias_b, bias_h, bias_q, H, ROWS, Q, DK, DKP, X, XBLOCKS
    )
    head = (b * H + h).to(tl.int64)
    recent = tl.load(lengths + 1).to(tl.int32)
    d, dv = tl.arange(0, DKP), tl.arange(0, DVP)

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
        top, mass, decay, p = raised(s, top, mass, ASM)
        v = tl.load(
            v_ring + cell[None, :] * DV + dv[:, None],
            mask=live[None, :] & (dv < DV)[:, None], other=0.0,
        )  # [DVP, XN]  # fmt: skip
        acc = product(v, p.to(v.dtype), acc * decay[None, :], ASM)

    g = h // (H // G)
    row = h % (H // G) * ROWS + r  # among those of its group
    slot = (b * G + g).to(tl.int64) * (splits + EXACTS) + splits + EXACTS - 1
    none = tl.zeros_like(mass)
    store_rows(
        stats, exact, slot, EXACTS - 1, head, row, r, top, mass, none, none, acc,
        ROWS, BLOCKS * M, STATS, 4, EXACTS, DV, DVP,
    )  # fmt: skip
