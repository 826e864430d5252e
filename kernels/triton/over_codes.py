"""One split of the coded tokens for one group of KV heads.

Softmax is kept relative to a reference of each query row, 2^top. The reference is raised only
when a score exceeds it by more than 10, which happens in the first tile and seldom after:
finding the largest score of a tile costs one number a tile then, not one a row, and sums need not
be scaled again (after Flash-Attention 4's conditional rescaling). Weights are multiplied by
2^``SHIFT`` before they become float16, whose largest number is 2^16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import load_run
from .score import (
    biased,
    capped,
    coarseness,
    code_scores,
    exp2,
    gains,
    held_tiles,
    listed,
    load_queries,
    log2_bound,
    product,
)
from .shares import own_tiles
from .spread import lacked
from .sums import mix, paired, rotations, store_sums
from .turned import load_turn, turned_scores

SLACK_BITS = tl.constexpr(0x41200000)
"""Those of a score that is 10 above the reference, in float32."""
SHIFT = tl.constexpr(4.0)
LEAST = tl.constexpr(-1e30)
"""A reference before there is one: finite, so that differences are never NaN."""


@triton.jit
def over_codes(
    work, splits, tails, pieces, q16, shift, centre, table, q, k_codes, k_gain, v_codes, v_gain,
    bias, lengths, k_pos, v_pos, k_basis, k_offsets, k_spans, k_waves, lacks, entries, counts,
    k_scores, v_scores, part, stats, k_rows, v_rows, length, k_slots, v_slots,
    bias_b, bias_h, bias_q, scale2,
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
    VS8: tl.constexpr, VS4: tl.constexpr, VS2: tl.constexpr,
    EK: tl.constexpr, EKP: tl.constexpr, EV: tl.constexpr, EVP: tl.constexpr,
    LIST: tl.constexpr, STATS: tl.constexpr, EXACTS: tl.constexpr, BIAS: tl.constexpr,
    CAP: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, PIECE: tl.constexpr,
    WHOLE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Leaves ``part [B, G, slots, BLOCKS * M, VW]`` and ``stats [.., STATS, BLOCKS * M]``.

    There is a slot for each split and tail, then one for the pool if there is one, and one for the
    ring.

    pieces: of ring and pool that programs over codes of a group do, PIECE: tiles that one takes as
    long as (``shares.py``).

    WHOLE: any row of a tile may be read: the capacity is a multiple of N, so that no tile reaches
    past it, or rows are listed. LIST: ``entries`` say which rows there are (``listing.py``), 1:
    those of keys, 2: those of slots, for ``tails`` programs behind the splits; 0: rows are tokens.
    STATS: 7 where values may lack bits, 4 else.
    """
    block = work % BLOCKS
    split = work // BLOCKS % (splits + tails)
    g = work // (BLOCKS * (splits + tails)) % G
    b = work // (BLOCKS * (splits + tails) * G)
    coded = tl.load(lengths).to(tl.int32)
    if LIST == 2:
        begin = length - k_slots - v_slots
        end = length
        tiles = (end - begin + N - 1) // N
        first, last = own_tiles(tiles, 0, split - splits, tails, block, BLOCKS, PIECE)
    else:
        begin = 0
        end = coded
        if LIST:
            end = tl.load(counts + b)
        tiles = (end + N - 1) // N
        first, last = own_tiles(tiles, pieces, split, splits, block, BLOCKS, PIECE)
    first = begin + first * N
    last = tl.minimum(begin + last * N, end)

    STRIDE: tl.constexpr = BLOCKS * M
    row = block * M + tl.arange(0, M)  # of the group's
    some = row < H // G * ROWS
    group = (b * G + g).to(tl.int64)
    gk, gv = g // (G // KG), g // (G // VG)
    if KX:
        k_base = k_codes + b.to(tl.int64) * k_rows * KPITCH + gk * DK
        d = tl.arange(0, DKP)
        q_row = q + (group * (H // G * ROWS) + row) * DK
        qx = tl.load(
            q_row[None, :] + d[:, None], mask=some[None, :] & (d < DK)[:, None], other=0.0
        )  # [DKP, M]  # fmt: skip
    elif KROT:
        k_base = k_codes + b.to(tl.int64) * k_rows * KPITCH + gk * (K8 + K4 + K2)
        turn = load_turn(
            g, scale2, q + (group * ROWS + row) * DK, some,
            k_basis, k_offsets, k_spans, k_waves,
            DK, KW, K8, K4, K2, KP8, KP4, KP2, KROT, KINTER, KHALF,
        )  # fmt: skip
        origin = tl.load(k_pos + b * k_slots).to(tl.int32)
    else:
        k_base = k_codes + b.to(tl.int64) * k_rows * KPITCH + gk * (K8 + K4 + K2)
        q_base = q16 + group * STRIDE * KW
        (
            q8_0, q8_1, q4_0, q4_1, q4_2, q4_3, q2_0, q2_1, q2_2, q2_3, q2_4, q2_5, q2_6, q2_7,
        ) = load_queries(q_base, row, some, K8, K4, K2, KP8, KP4, KP2, KW)  # fmt: skip
        chunk = tl.arange(0, CHUNKSP)
        too_much = tl.load(
            centre + group * (CHUNKS * STRIDE) + chunk[:, None] * STRIDE + row[None, :],
            mask=(chunk < CHUNKS)[:, None] & some[None, :], other=0.0,
        )  # [CHUNKSP, M]  # fmt: skip
        less = tl.sum(too_much, 0)
        # The same for all coded tokens of a row, so it is added to the reference at the end,
        # unless scores are capped.
        mean = tl.load(shift + group * STRIDE + row, mask=some, other=0.0)
        if not KGAIN:
            mean += less
    if VX:
        v_base = v_codes + b.to(tl.int64) * v_rows * VPITCH + gv * DV
    else:
        v_base = v_codes + b.to(tl.int64) * v_rows * VPITCH + gv * (V8 + V4 + V2)
    real = tl.where(some, row, 0)  # rows that are none read the mask of one that is
    rows_bias = (g * (H // G) * (ROWS // Q) + real // Q) * bias_h + real % Q * bias_q
    bias_row = bias + b.to(tl.int64) * bias_b

    if EK + EV:
        coarse = coarseness((last - first + N - 1) // N)
        pooled = tl.full([], 0, tl.int64)
        if EK:
            pooled |= held_tiles(k_pos + b * EK, EK, EKP, coded, first, N, coarse)
        if EV:
            pooled |= held_tiles(v_pos + b * EV, EV, EVP, coded, first, N, coarse)

    top = tl.full([M], LEAST, tl.float32)
    # Summed over all tokens after the loop: no exchange in it.
    mass = tl.full([N // 16, 8, M], 0.0, tl.float32)
    gained = tl.full([N // 16, 8, M], 0.0, tl.float32)
    if STATS > 4:
        lack8, lack4, lack2 = gained, gained, gained
    if VX:
        a16 = tl.full([DVP, M], 0.0, tl.float32)
    if V8:
        t8 = rotations(table, VP8, 8, VS8)
        a8_0 = tl.full([VS8 * VP8 // 2, M], 0.0, tl.float32)
        a8_1 = a8_0
    if V4:
        t4 = rotations(table, VP4, 4, VS4)
        a4_0 = tl.full([VS4 * VP4 // 2, M], 0.0, tl.float32)
        a4_1, a4_2, a4_3 = a4_0, a4_0, a4_0
    if V2:
        t2 = rotations(table, VP2, 2, VS2)
        a2_0 = tl.full([VS2 * VP2 // 2, M], 0.0, tl.float32)
        a2_1, a2_2, a2_3, a2_4, a2_5, a2_6, a2_7 = a2_0, a2_0, a2_0, a2_0, a2_0, a2_0, a2_0

    if LIST:
        listed_row = entries + 3 * b.to(tl.int64) * length
        k_scores += group * (H // G * ROWS) * (k_slots + 1)
        v_scores += group * (H // G * ROWS) * v_slots
    # Gains are too narrow for asynchronous copies: they are loaded one tile ahead by hand.
    n = first + tl.arange(0, N)
    if KGAIN:
        k_gains = k_gain + b.to(tl.int64) * k_rows * KG + gk
        if LIST < 2:
            next_t = gains(k_gains, n, n < last, KG)
    if VGAIN:
        v_gains = v_gain + b.to(tl.int64) * v_rows * VG + gv
        if LIST:
            at = tl.load(listed_row + 2 * length + n, mask=n < last, other=-1)
            next_at = tl.load(listed_row + 2 * length + n + N, mask=n + N < last, other=-1)
            next_u = gains(v_gains, tl.maximum(at, 0), at >= 0, VG)
        else:
            next_u = gains(v_gains, n, n < last, VG)
    if STATS > 4:
        lack_row = lacks + b.to(tl.int64) * v_rows

    for start in tl.range(first, last, N, num_stages=STAGES):
        n = start + tl.arange(0, N)
        inside = n < last
        live = inside
        k_row, v_row, token, in_codes = n, n, n, inside
        if LIST:
            token = tl.load(listed_row + n, mask=inside, other=-1)
            v_at = tl.load(listed_row + 2 * length + n, mask=inside, other=-1)
            live = token >= 0
            in_codes = live & (v_at >= 0)  # row 0 may be stale
            if LIST == 2:
                k_at = tl.load(listed_row + length + n, mask=inside, other=0)
                k_row = tl.maximum(k_at, 0)
            else:
                k_row = tl.minimum(n, k_rows - 1)
            v_row, token = tl.maximum(v_at, 0), tl.maximum(token, 0)
        if EK + EV:  # noqa: SIM102  (known when the kernel is compiled, unlike the other)
            if (pooled >> (((start - first) // N) >> coarse)) & 1:
                if EK:
                    live = live & (listed(n, k_pos + b * EK, EK, EKP, coded) == 0)
                if EV:
                    live = live & (listed(n, v_pos + b * EV, EV, EVP, coded) == 0)
        if KX:
            in_keys = inside[:, None] & (d < DK)[None, :]
            k = tl.load(k_base + k_row[:, None] * KPITCH + d[None, :], mask=in_keys, other=0.0)
            s = product(k, qx, tl.full([N, M], 0.0, tl.float32), ASM) * scale2
        elif KROT:
            t = 1.0
            if KGAIN:
                if LIST == 2:
                    t = gains(k_gains, k_row, live, KG).to(tl.float32)
                else:
                    t = next_t.to(tl.float32)
                    next_t = gains(k_gains, n + N, n + N < last, KG)
            s = turned_scores(
                turn, k_base, t, k_row, token, inside, origin,
                N, KHALF, KPITCH, K8, K4, K2, KP8, KP4, KP2, KGAIN, WHOLE, ASM,
            )  # fmt: skip
        else:
            s = code_scores(
                q8_0, q8_1, q4_0, q4_1, q4_2, q4_3,
                q2_0, q2_1, q2_2, q2_3, q2_4, q2_5, q2_6, q2_7, k_base, k_row, inside,
                M, N, KPITCH, K8, K4, K2, KP8, KP4, KP2, WHOLE, ASM,
            )  # fmt: skip
            if KGAIN:
                if LIST == 2:
                    t = gains(k_gains, k_row, live, KG).to(tl.float32)
                else:
                    t = next_t.to(tl.float32)
                    next_t = gains(k_gains, n + N, n + N < last, KG)
                s = (s + less[None, :]) * t[:, None]
            if CAP > 0:
                s = s + mean[None, :]
        if LIST == 2:
            in_pool = k_at < 0
            known = tl.load(
                k_scores + row[None, :] * (k_slots + 1) + (-1 - k_at)[:, None],
                mask=in_pool[:, None] & some[None, :], other=0.0,
            )  # [N, M]  # fmt: skip
            if not KX and KROT == 0 and CAP == 0:
                known -= mean[None, :]
            s = tl.where(in_pool[:, None], known, s)
        if CAP > 0:
            s = capped(s, CAP, ASM)
        s = biased(s, bias_row, token, live, rows_bias, BIAS)
        if LIST == 2:
            in_pool = live & (v_at < 0)
            whole = s
            if not KX and KROT == 0 and CAP == 0:
                whole += mean[None, :]
            where = v_scores + row[None, :] * v_slots + (-1 - v_at)[:, None]
            tl.store(where, whole, mask=in_pool[:, None] & some[None, :])
            s = tl.where(in_pool[:, None], -float("inf"), s)
        if VGAIN:
            # The reference is that of the weights times the gains: they must fit float16.
            u = next_u.to(tl.float32)
            if LIST:
                next_u = gains(v_gains, tl.maximum(next_at, 0), next_at >= 0, VG)
                after_next = n + 2 * N
                next_at = tl.load(
                    listed_row + 2 * length + after_next, mask=after_next < last, other=-1
                )
            else:
                next_u = gains(v_gains, n + N, n + N < last, VG)
            reach = s + log2_bound(u)[:, None]
        else:
            reach = s
        # Positive numbers are in the order of their bits, and those of the others are negative:
        # the GPU finds the largest integer of a warp in one instruction, but no float.
        above = (reach - top[None, :]).to(tl.int32, bitcast=True)
        if tl.max(tl.reshape(above, (N * M,), can_reorder=True), 0) > SLACK_BITS:
            new = tl.maximum(top, tl.max(reach, 0))
            decay = exp2(top - new, ASM)[None, :]
            top = new
            mass = mass * decay[None, :, :]
            gained = gained * decay[None, :, :]
            if STATS > 4:
                lack8 = lack8 * decay[None, :, :]
                lack4 = lack4 * decay[None, :, :]
                lack2 = lack2 * decay[None, :, :]
            if VX:
                a16 = a16 * decay
            if V8:
                a8_0 = a8_0 * decay
                if VS8 < 2:
                    a8_1 = a8_1 * decay
            if V4:
                a4_0 = a4_0 * decay
                if VS4 < 4:
                    a4_1 = a4_1 * decay
                if VS4 < 2:
                    a4_2 = a4_2 * decay
                    a4_3 = a4_3 * decay
            if V2:
                a2_0 = a2_0 * decay
                if VS2 < 8:
                    a2_1 = a2_1 * decay
                if VS2 < 4:
                    a2_2 = a2_2 * decay
                    a2_3 = a2_3 * decay
                if VS2 < 2:
                    a2_4 = a2_4 * decay
                    a2_5 = a2_5 * decay
                    a2_6 = a2_6 * decay
                    a2_7 = a2_7 * decay
        p = exp2(s - (top - SHIFT)[None, :], ASM)
        mass += paired(p, N, M)
        if VGAIN:
            p = p * u[:, None]
        if VX:
            dv = tl.arange(0, DVP)
            in_values = (dv < DV)[:, None] & in_codes[None, :]
            v = tl.load(v_base + v_row[None, :] * VPITCH + dv[:, None], mask=in_values, other=0.0)
            a16 = product(v, p.to(v.dtype), a16, ASM)
        else:
            p16 = p.to(tl.float16)
            gained += paired(p16.to(tl.float32), N, M)
            if STATS > 4:
                lack = tl.load(lack_row + v_row, mask=inside, other=0).to(tl.int32)
                lack8 += paired(p16.to(tl.float32) * lacked(lack, 8)[:, None], N, M)
                lack4 += paired(p16.to(tl.float32) * lacked(lack, 4)[:, None], N, M)
                lack2 += paired(p16.to(tl.float32) * lacked(lack, 2)[:, None], N, M)
        if V8:
            words = load_run(
                v_base, v_row, inside, VPITCH, 0, V8, VP8, WHOLE, True, VS8
            )  # fmt: skip
            a8_0 = mix(p16, words, a8_0, t8, 8, 0, VP8, VS8, N, ASM)
            if VS8 < 2:
                a8_1 = mix(p16, words, a8_1, t8, 8, 1, VP8, VS8, N, ASM)
        if V4:
            words = load_run(
                v_base, v_row, inside, VPITCH, V8, V4, VP4, WHOLE, True, VS4
            )  # fmt: skip
            a4_0 = mix(p16, words, a4_0, t4, 4, 0, VP4, VS4, N, ASM)
            if VS4 < 4:
                a4_1 = mix(p16, words, a4_1, t4, 4, 1, VP4, VS4, N, ASM)
            if VS4 < 2:
                a4_2 = mix(p16, words, a4_2, t4, 4, 2, VP4, VS4, N, ASM)
                a4_3 = mix(p16, words, a4_3, t4, 4, 3, VP4, VS4, N, ASM)
        if V2:
            words = load_run(
                v_base, v_row, inside, VPITCH, V8 + V4, V2, VP2, WHOLE, True, VS2
            )  # fmt: skip
            a2_0 = mix(p16, words, a2_0, t2, 2, 0, VP2, VS2, N, ASM)
            if VS2 < 8:
                a2_1 = mix(p16, words, a2_1, t2, 2, 1, VP2, VS2, N, ASM)
            if VS2 < 4:
                a2_2 = mix(p16, words, a2_2, t2, 2, 2, VP2, VS2, N, ASM)
                a2_3 = mix(p16, words, a2_3, t2, 2, 3, VP2, VS2, N, ASM)
            if VS2 < 2:
                a2_4 = mix(p16, words, a2_4, t2, 2, 4, VP2, VS2, N, ASM)
                a2_5 = mix(p16, words, a2_5, t2, 2, 5, VP2, VS2, N, ASM)
                a2_6 = mix(p16, words, a2_6, t2, 2, 6, VP2, VS2, N, ASM)
                a2_7 = mix(p16, words, a2_7, t2, 2, 7, VP2, VS2, N, ASM)

    slot = group * (splits + tails + EXACTS) + split
    total = tl.sum(tl.sum(mass, 0), 0)
    if not KX and KROT == 0 and CAP == 0:
        top += mean
    at_stats = stats + slot * (STATS * STRIDE) + row
    tl.store(at_stats, top - SHIFT)
    tl.store(at_stats + STRIDE, total)
    tl.store(at_stats + 2 * STRIDE, total)
    tl.store(at_stats + 3 * STRIDE, tl.sum(tl.sum(gained, 0), 0))
    if STATS > 4:
        tl.store(at_stats + 4 * STRIDE, tl.sum(tl.sum(lack8, 0), 0))
        tl.store(at_stats + 5 * STRIDE, tl.sum(tl.sum(lack4, 0), 0))
        tl.store(at_stats + 6 * STRIDE, tl.sum(tl.sum(lack2, 0), 0))
    out = part + slot * (VW * STRIDE)
    if VX:
        dv = tl.arange(0, DVP)
        held = (dv < VW)[:, None] & some[None, :]
        tl.store(out + row[None, :] * VW + dv[:, None], a16, mask=held)
    if V8:
        store_sums(out, a8_0, row, some, 0, 0, V8, VP8, VS8, VW)
        if VS8 < 2:
            store_sums(out, a8_1, row, some, 1, 0, V8, VP8, VS8, VW)
    if V4:
        store_sums(out, a4_0, row, some, 0, V8, V4, VP4, VS4, VW)
        if VS4 < 4:
            store_sums(out, a4_1, row, some, 1, V8, V4, VP4, VS4, VW)
        if VS4 < 2:
            store_sums(out, a4_2, row, some, 2, V8, V4, VP4, VS4, VW)
            store_sums(out, a4_3, row, some, 3, V8, V4, VP4, VS4, VW)
    if V2:
        after: tl.constexpr = V8 + 2 * V4
        store_sums(out, a2_0, row, some, 0, after, V2, VP2, VS2, VW)
        if VS2 < 8:
            store_sums(out, a2_1, row, some, 1, after, V2, VP2, VS2, VW)
        if VS2 < 4:
            store_sums(out, a2_2, row, some, 2, after, V2, VP2, VS2, VW)
            store_sums(out, a2_3, row, some, 3, after, V2, VP2, VS2, VW)
        if VS2 < 2:
            store_sums(out, a2_4, row, some, 4, after, V2, VP2, VS2, VW)
            store_sums(out, a2_5, row, some, 5, after, V2, VP2, VS2, VW)
            store_sums(out, a2_6, row, some, 6, after, V2, VP2, VS2, VW)
            store_sums(out, a2_7, row, some, 7, after, V2, VP2, VS2, VW)
