"""Tokens of pools of any size: their keys before the kernel over tokens, their values behind it.

That kernel reads scores of keys that are in a pool instead of making them, and leaves the scores of
tokens whose values are in one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .exact_rows import raised, rows_of, store_rows
from .score import product


@triton.jit
def score_slots(
    work, tile, q, k_pos, k_pool, coded, k_scores, v_scores, k_slots, v_slots, scale2,
    H: tl.constexpr, ROWS: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr,
    X: tl.constexpr, XBLOCKS: tl.constexpr, E: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Scores of E slots of the keys' pool in units of log2, ``k_scores [B, H, ROWS, k_slots + 1]``.

    NaN in the last. And -inf into ``v_scores [B, H, ROWS, v_slots]``: nothing is seen there yet.
    """
    b, _, head, r = rows_of(work, H, X, XBLOCKS)
    d = tl.arange(0, DKP)
    # Not by load_rows: what such a function gives is taken for an address in q that is written to.
    qx = tl.load(
        q + (head * ROWS + r)[None, :] * DK + d[:, None],
        mask=(r < ROWS)[None, :] & (d < DK)[:, None], other=0.0,
    )  # [DKP, X]  # fmt: skip
    e = tile * E + tl.arange(0, E)
    held = tl.load(k_pos + b * k_slots + e, mask=e < k_slots, other=-1).to(tl.int32)
    k = tl.load(
        k_pool + (head * k_slots + e)[:, None] * DK + d[None, :],
        mask=((held >= 0) & (held < coded))[:, None] & (d < DK)[None, :], other=0.0,
    )  # [E, DKP]  # fmt: skip
    s = product(k, qx, tl.full([E, X], 0.0, tl.float32), ASM) * scale2
    mine = (r < ROWS)[None, :]
    row = head * ROWS + r
    s = tl.where((e == k_slots)[:, None], float("nan"), s)
    where = k_scores + row[None, :] * (k_slots + 1) + e[:, None]
    tl.store(where, s, mask=mine & (e <= k_slots)[:, None])
    none = tl.full([E, X], -float("inf"), tl.float32)
    where = v_scores + row[None, :] * v_slots + e[:, None]
    tl.store(where, none, mask=mine & (e < v_slots)[:, None])


@triton.jit
def value_slots_kernel(
    v_pos, v_pool, v_scores, lengths, stats, exact, splits, v_slots,
    H: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, STRIDE: tl.constexpr,
    STATS: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    X: tl.constexpr, XBLOCKS: tl.constexpr, E: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """X rows of one head over the pool of values, to place 0 of ``exact`` and slot ``splits``."""
    b, h, head, r = rows_of(tl.program_id(0), H, X, XBLOCKS)
    coded = tl.load(lengths).to(tl.int32)
    dv = tl.arange(0, DVP)
    top = tl.full([X], -float("inf"), tl.float32)
    mass = tl.full([X], 0.0, tl.float32)
    acc = tl.full([DVP, X], 0.0, tl.float32)
    for start in tl.range(0, v_slots, E, num_stages=3):
        e = start + tl.arange(0, E)
        s = tl.load(
            v_scores + (head * ROWS + r)[None, :] * v_slots + e[:, None],
            mask=(r < ROWS)[None, :] & (e < v_slots)[:, None], other=-float("inf"),
        )  # [E, X]  # fmt: skip
        top, mass, decay, p = raised(s, top, mass, ASM)
        held = tl.load(v_pos + b * v_slots + e, mask=e < v_slots, other=-1).to(tl.int32)
        live = (held >= 0) & (held < coded)
        v = tl.load(
            v_pool + (head * v_slots + e)[None, :] * DV + dv[:, None],
            mask=live[None, :] & (dv < DV)[:, None], other=0.0,
        )  # [DVP, E]  # fmt: skip
        acc = product(v, p.to(v.dtype), acc * decay[None, :], ASM)
    row = h % (H // G) * ROWS + r
    slot = (b * G + h // (H // G)).to(tl.int64) * (splits + 2) + splits  # the ring's is behind it
    none = tl.zeros_like(mass)
    store_rows(
        stats, exact, slot, 0, head, row, r, top, mass, none, none, acc,
        ROWS, STRIDE, STATS, 4, 2, DV, DVP,
    )  # fmt: skip
