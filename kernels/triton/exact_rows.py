"""Query rows of one head, as programs over its ring and over its pool read them and leave them."""

from __future__ import annotations

import triton
import triton.language as tl

from .score import exp2

LIFT = tl.constexpr(14.0)
"""Weights of ring and pool are multiplied by 2^14 before they become float16: small ones keep their
digits, and none is more than 1."""


@triton.jit
def rows_of(work, H: tl.constexpr, X: tl.constexpr, XBLOCKS: tl.constexpr):
    """The X rows of a program: sequence, head, head of all sequences, rows of the head ``[X]``."""
    h = work // XBLOCKS % H
    b = work // (XBLOCKS * H)
    return b, h, (b * H + h).to(tl.int64), work % XBLOCKS * X + tl.arange(0, X)


@triton.jit
def raised(s, top, mass, ASM: tl.constexpr):
    """Softmax goes on with scores ``s [tokens, rows]``, relative to the largest so far.

    The largest now, the mass, what sums so far are multiplied by, and the weights.
    """
    new = tl.maximum(top, tl.max(s, 0))
    base = tl.where(new == -float("inf"), 0.0, new)
    decay = exp2(top - base, ASM)
    p = exp2(s - (base - LIFT)[None, :], ASM)
    return new, mass * decay + tl.sum(p, 0), decay, p


@triton.jit
def load_rows(
    work, q, bias, bias_b, bias_h, bias_q,
    H: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr,
    X: tl.constexpr, XBLOCKS: tl.constexpr,
):  # fmt: skip
    """The X rows of a program: sequence, head, rows ``[X]``, queries ``[DKP, X]``, their mask.

    Rows are those of the head; which of them there are is ``rows < ROWS``.
    """
    b, h, head, r = rows_of(work, H, X, XBLOCKS)
    mine = r < ROWS
    d = tl.arange(0, DKP)
    qx = tl.load(
        q + (head * ROWS + r)[None, :] * DK + d[:, None],
        mask=mine[None, :] & (d < DK)[:, None], other=0.0,
    )  # fmt: skip
    real = tl.where(mine, r, 0)  # rows that are none read the mask of one that is
    rows_bias = (h * (ROWS // Q) + real // Q) * bias_h + real % Q * bias_q
    return b, h, r, qx, bias + b.to(tl.int64) * bias_b, rows_bias


@triton.jit
def store_rows(
    stats, exact, slot, place, head, row, r, top, mass, coded_mass, gained, acc,
    ROWS: tl.constexpr, STRIDE: tl.constexpr, STATS: tl.constexpr, HAVE: tl.constexpr,
    EXACTS: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """Stats into a slot, and ``acc [DVP, X]`` into ``exact [B, H, ROWS, EXACTS, DV]`` at ``place``.

    row: the rows among those of their group. Of the STATS numbers of a row the first four are given
    here; the caller itself leaves others up to HAVE, and the rest is 0.
    """
    mine = r < ROWS
    at_stats = stats + slot * (STATS * STRIDE) + row
    tl.store(at_stats, top - LIFT, mask=mine)
    tl.store(at_stats + STRIDE, mass, mask=mine)
    tl.store(at_stats + 2 * STRIDE, coded_mass, mask=mine)
    tl.store(at_stats + 3 * STRIDE, gained, mask=mine)
    for i in tl.static_range(HAVE, STATS):
        tl.store(at_stats + i * STRIDE, tl.zeros_like(mass), mask=mine)
    dv = tl.arange(0, DVP)
    where = exact + ((head * ROWS + r) * EXACTS + place)[None, :] * DV + dv[:, None]
    tl.store(where, acc, mask=mine[None, :] & (dv < DV)[:, None])
