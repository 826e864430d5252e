"""The pool of one KV head.

A token that the pool holds takes no part in ``over_codes``. Here it has the pool's key if the pool
of keys has it, else its code's, and likewise for values. That takes several reads, each of which
waits for another, so that the pool has programs of its own beside those over the ring.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import converted, load_run
from .exact_rows import LIFT, load_rows, store_rows
from .score import (
    biased,
    capped,
    code_scores,
    exp2,
    gains,
    listed,
    load_queries,
    log2_bound,
    product,
)
from .spread import lacked
from .turned import load_turn, turned_scores


@triton.jit
def _store_sums(
    out, sums, rows, some, CODE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, VW: tl.constexpr,
):  # fmt: skip
    """Weighted sums of one code of each word, to ``out [rows, VW]``, in the order of codes."""
    word = tl.arange(0, PAD // 2)
    where = out + rows[None, :] * VW + (START + CODE * (WIDTH // 2) + word)[:, None]
    tl.store(where, sums, mask=(word < WIDTH // 2)[:, None] & some[None, :])


@triton.jit
def _store_lacked(stats, w16, lack, some, STRIDE: tl.constexpr):
    """What weighted codes of 8, 4 and 2 bits lack in the mean, behind the fourth of the stats."""
    w, lack = w16.to(tl.float32), lack.to(tl.int32)
    tl.store(stats + 4 * STRIDE, tl.sum(w * lacked(lack, 8)[:, None], 0), mask=some)
    tl.store(stats + 5 * STRIDE, tl.sum(w * lacked(lack, 4)[:, None], 0), mask=some)
    tl.store(stats + 6 * STRIDE, tl.sum(w * lacked(lack, 2)[:, None], 0), mask=some)


@triton.jit
def over_pool(
    work, splits, q16, shift, centre, q, k_codes, k_gain, v_codes, v_gain, bias, lengths,
    k_pos, v_pos, k_basis, k_offsets, k_spans, k_waves, k_pool, v_pool, lacks,
    part, stats, exact, capacity, bias_b, bias_h, bias_q, scale2,
    H: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    BLOCKS: tl.constexpr, KG: tl.constexpr, VG: tl.constexpr,
    KX: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, KW: tl.constexpr,
    KPITCH: tl.constexpr, K8: tl.constexpr, K4: tl.constexpr, K2: tl.constexpr,
    KP8: tl.constexpr, KP4: tl.constexpr, KP2: tl.constexpr, KGAIN: tl.constexpr,
    KROT: tl.constexpr, KINTER: tl.constexpr, KHALF: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNKSP: tl.constexpr,
    VX: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, VW: tl.constexpr,
    VPITCH: tl.constexpr, V8: tl.constexpr, V4: tl.constexpr, V2: tl.constexpr,
    VP8: tl.constexpr, VP4: tl.constexpr, VP2: tl.constexpr, VGAIN: tl.constexpr,
    EK: tl.constexpr, EKP: tl.constexpr, EV: tl.constexpr, EVP: tl.constexpr,
    STATS: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, X: tl.constexpr,
    XBLOCKS: tl.constexpr, LISTED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """X rows of one head: ``exact [B, H, ROWS, 0, DV]``; sums and stats in slot ``splits``."""
    b, h, r, qx, bias_row, rows_bias = load_rows(
        work, q, bias, bias_b, bias_h, bias_q, H, ROWS, Q, DK, DKP, X, XBLOCKS
    )
    head = (b * H + h).to(tl.int64)
    mine = r < ROWS
    coded = tl.load(lengths).to(tl.int32)
    d, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    STRIDE: tl.constexpr = BLOCKS * M

    # Its rows among those of its group, in the slot behind the splits.
    g = h // (H // G)
    row = h % (H // G) * ROWS + r
    group = (b * G + g).to(tl.int64)
    slot = group * (splits + 2) + splits  # the ring's is behind it
    gained = tl.full([X], 0.0, tl.float32)
    # Pool tokens: slots of the keys' pool, then those of the values' that it lacks.
    i = tl.arange(0, LISTED)
    token = tl.full([LISTED], -1, tl.int32)
    if EK:
        token = tl.load(k_pos + b * EK + i, mask=i < EK, other=-1).to(tl.int32)
    if EV:
        only = tl.load(v_pos + b * EV + i - EK, mask=(i >= EK) & (i < EK + EV), other=-1)
        only = only.to(tl.int32)
        if EK:
            only = tl.where(listed(only, k_pos + b * EK, EK, EKP, coded), -1, only)
        token = tl.where(i < EK, token, only)
    live = (token >= 0) & (token < coded)
    s = tl.full([LISTED, X], 0.0, tl.float32)
    if EK:
        k_live = live & (i < EK)
        k = tl.load(
            k_pool + (head * EK + i)[:, None] * DK + d[None, :],
            mask=k_live[:, None] & (d < DK)[None, :], other=0.0,
        )  # [LISTED, DKP]  # fmt: skip
        s = product(k, qx, s, ASM) * scale2
    if EV:
        k_live = live & (i >= EK)
        gk = g // (G // KG)
        if KX:
            k_base = k_codes + b.to(tl.int64) * capacity * KPITCH + gk * DK
            k = tl.load(
                k_base + token[:, None] * KPITCH + d[None, :],
                mask=k_live[:, None] & (d < DK)[None, :], other=0.0,
            )  # [LISTED, DKP]  # fmt: skip
            other = tl.full([LISTED, X], 0.0, tl.float32)
            other = product(k, qx, other, ASM) * scale2
        elif KROT:
            k_base = k_codes + b.to(tl.int64) * capacity * KPITCH + gk * (K8 + K4 + K2)
            turn = load_turn(
                h, scale2, q + (head * ROWS + r) * DK, mine,
                k_basis, k_offsets, k_spans, k_waves,
                DK, KW, K8, K4, K2, KP8, KP4, KP2, KROT, KINTER, KHALF,
            )  # fmt: skip
            t = 1.0
            if KGAIN:
                k_gains = k_gain + b.to(tl.int64) * capacity * KG + gk
                t = gains(k_gains, token, k_live, KG).to(tl.float32)
            other = turned_scores(
                turn, k_base, t, token, token, k_live, tl.load(k_pos + b * EK).to(tl.int32),
                LISTED, KHALF, KPITCH, K8, K4, K2, KP8, KP4, KP2, KGAIN, False, ASM,
            )  # fmt: skip
        else:
            k_base = k_codes + b.to(tl.int64) * capacity * KPITCH + gk * (K8 + K4 + K2)
            q_base = q16 + group * STRIDE * KW
            (
                q8_0, q8_1, q4_0, q4_1, q4_2, q4_3,
                q2_0, q2_1, q2_2, q2_3, q2_4, q2_5, q2_6, q2_7,
            ) = load_queries(q_base, row, mine, K8, K4, K2, KP8, KP4, KP2, KW)  # fmt: skip
            chunk = tl.arange(0, CHUNKSP)
            too_much = tl.load(
                centre + group * (CHUNKS * STRIDE) + chunk[:, None] * STRIDE + row[None, :],
                mask=(chunk < CHUNKS)[:, None] & mine[None, :], other=0.0,
            )  # [CHUNKSP, X]  # fmt: skip
            other = code_scores(
                q8_0, q8_1, q4_0, q4_1, q4_2, q4_3,
                q2_0, q2_1, q2_2, q2_3, q2_4, q2_5, q2_6, q2_7, k_base, token, k_live,
                X, LISTED, KPITCH, K8, K4, K2, KP8, KP4, KP2, False, ASM,
            )  # fmt: skip
            other = other + tl.sum(too_much, 0)[None, :]
            if KGAIN:
                k_gains = k_gain + b.to(tl.int64) * capacity * KG + gk
                t = gains(k_gains, token, k_live, KG).to(tl.float32)
                other = other * t[:, None]
            mean = tl.load(shift + group * STRIDE + row, mask=mine, other=0.0)
            other = other + mean[None, :]
        s = tl.where((i < EK)[:, None], s, other)
    if CAP > 0:
        s = capped(s, CAP, ASM)
    s = biased(s, bias_row, token, live, rows_bias, BIAS)

    by_code = live
    if EV:
        by_code = live & (listed(token, v_pos + b * EV, EV, EVP, coded) == 0)
    gv = g // (G // VG)
    u = tl.full([LISTED], 1.0, tl.float32)
    if VGAIN:
        v_gains = v_gain + b.to(tl.int64) * capacity * VG + gv
        u = gains(v_gains, token, by_code, VG).to(tl.float32)
    more = tl.maximum(log2_bound(u), 0.0)  # p * u must fit float16 as well as p
    top = tl.max(s + more[:, None], 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    p = exp2(s - (base - LIFT)[None, :], ASM)
    mass = tl.sum(p, 0)
    acc = tl.full([DVP, X], 0.0, tl.float32)
    if EV:
        e = tl.arange(0, EVP)
        held = tl.load(v_pos + b * EV + e, mask=e < EV, other=-1).to(tl.int32)
        held = tl.where(held < coded, held, -1)
        v = tl.load(
            v_pool + (head * EV + e)[None, :] * DV + dv[:, None],
            mask=(held >= 0)[None, :] & (dv < DV)[:, None], other=0.0,
        )  # [DVP, EVP]  # fmt: skip
        same = (held[:, None] == token[None, :]) & live[None, :]  # [EVP, LISTED]
        by_slot = tl.full([EVP, X], 0.0, tl.float32)
        same = same.to(tl.float32).to(v.dtype)
        by_slot = product(same, p.to(v.dtype), by_slot, ASM)  # one term each: exact
        acc = product(v, by_slot.to(v.dtype), acc, ASM)
    w = tl.where(by_code[:, None], p, 0.0)
    coded_mass = tl.sum(w, 0)
    w = w * u[:, None]
    out = part + slot * (VW * STRIDE)
    if VX:
        v_base = v_codes + b.to(tl.int64) * capacity * VPITCH + gv * DV
        v = tl.load(
            v_base + token[None, :] * VPITCH + dv[:, None],
            mask=by_code[None, :] & (dv < DV)[:, None], other=0.0,
        )  # [DVP, LISTED]  # fmt: skip
        acc = product(v, w.to(v.dtype), acc, ASM)
    else:
        v_base = v_codes + b.to(tl.int64) * capacity * VPITCH + gv * (V8 + V4 + V2)
        w16 = w.to(tl.float16)
        gained = tl.sum(w16.to(tl.float32), 0)
        if V8:
            words = load_run(v_base, token, by_code, VPITCH, 0, V8, VP8, False, True)
            for c in tl.static_range(2):
                sums = tl.dot(converted(words, 8, c, ASM), w16)
                _store_sums(out, sums, row, mine, c, 0, V8, VP8, VW)
        if V4:
            words = load_run(v_base, token, by_code, VPITCH, V8, V4, VP4, False, True)
            for c in tl.static_range(4):
                sums = tl.dot(converted(words, 4, c, ASM), w16)
                _store_sums(out, sums, row, mine, c, V8, V4, VP4, VW)
        if V2:
            words = load_run(v_base, token, by_code, VPITCH, V8 + V4, V2, VP2, False, True)
            for c in tl.static_range(8):
                sums = tl.dot(converted(words, 2, c, ASM), w16)
                _store_sums(out, sums, row, mine, c, V8 + 2 * V4, V2, VP2, VW)

    store_rows(
        stats, exact, slot, 0, head, row, r, top, mass, coded_mass, gained, acc,
        ROWS, STRIDE, STATS, STATS, 2, DV, DVP,
    )  # fmt: skip
    if STATS > 4:
        lack = tl.load(lacks + b.to(tl.int64) * capacity + token, mask=by_code, other=0)
        _store_lacked(stats + slot * (STATS * STRIDE) + row, w16, lack, mine, STRIDE)
