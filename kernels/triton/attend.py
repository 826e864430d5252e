"""Packed attention of one decode step: one launch over codes, pool and ring.

Programs of two kinds share the launch:

- ``_over_codes``: one split of the coded tokens for one group of KV heads. All query rows of the
  group (query heads x queries) meet one tile of codes, so that each code is read once.
- ``_over_exact``: ring and pool of one KV head.

Each leaves what softmax needs to be put together later (``merge.py``): the largest score m, the
masses l and the weighted sums, all relative to 2^m. Scores are in units of log2. The maths is in
``codec/transform.py``; splitting over tokens and merging by log-sum-exp is Flash-Decoding (Dao et
al., 2023).

A token that the pool holds takes no part in ``_over_codes``. ``_over_exact`` gives it the pool's
key if the pool of keys has it, else its code's, and likewise for values.

Weights are multiplied by 2^14 before they become float16: small ones keep their digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import centred, components, load_run

SHIFT = tl.constexpr(14.0)


@triton.jit
def _load_q(
    base, rows, BITS: tl.constexpr, CODE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, KW: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """Folded queries by word of a run, ``[rows, PAD / 2]``, or ``[PAD / 2, rows]`` with FLIP."""
    column = components(BITS, CODE, START, WIDTH, PAD)
    some = tl.arange(0, PAD // 2) < WIDTH // 2
    if FLIP:
        where = base + rows[None, :] * KW + column[:, None]
        return tl.load(where, mask=some[:, None], other=0.0)
    else:
        where = base + rows[:, None] * KW + column[None, :]
        return tl.load(where, mask=some[None, :], other=0.0)


@triton.jit
def _half_sum(q, FLIP: tl.constexpr):
    """Half the sum of each folded query: what it scores against 1/2 in all components."""
    return tl.sum(q.to(tl.float32), 0 if FLIP else 1) * 0.5


@triton.jit
def _dot_scores(q, codes, acc, FLIP: tl.constexpr):
    """``acc + q codes^T``; with FLIP all of it transposed, so that codes are the left operand."""
    if FLIP:
        return tl.dot(codes, q, acc)
    else:
        return tl.dot(q, tl.trans(codes), acc)


@triton.jit
def _code_scores(
    q8_0, q8_1, q4_0, q4_1, q4_2, q4_3,
    q2_0, q2_1, q2_2, q2_3, q2_4, q2_5, q2_6, q2_7, base, tokens, live,
    ROWS: tl.constexpr, TILE: tl.constexpr, PITCH: tl.constexpr,
    W8: tl.constexpr, W4: tl.constexpr, W2: tl.constexpr,
    P8: tl.constexpr, P4: tl.constexpr, P2: tl.constexpr,
    FLIP: tl.constexpr, ALL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Folded queries against centred codes: ``[ROWS, TILE]``."""
    if FLIP:
        s = tl.full([TILE, ROWS], 0.0, tl.float32)
    else:
        s = tl.full([ROWS, TILE], 0.0, tl.float32)
    if W8:
        words = load_run(base, tokens, live, PITCH, 0, W8, P8, ALL)
        s = _dot_scores(q8_0, centred(words, 8, 0, ASM), s, FLIP)
        s = _dot_scores(q8_1, centred(words, 8, 1, ASM), s, FLIP)
    if W4:
        words = load_run(base, tokens, live, PITCH, W8, W4, P4, ALL)
        s = _dot_scores(q4_0, centred(words, 4, 0, ASM), s, FLIP)
        s = _dot_scores(q4_1, centred(words, 4, 1, ASM), s, FLIP)
        s = _dot_scores(q4_2, centred(words, 4, 2, ASM), s, FLIP)
        s = _dot_scores(q4_3, centred(words, 4, 3, ASM), s, FLIP)
    if W2:
        words = load_run(base, tokens, live, PITCH, W8 + W4, W2, P2, ALL)
        s = _dot_scores(q2_0, centred(words, 2, 0, ASM), s, FLIP)
        s = _dot_scores(q2_1, centred(words, 2, 1, ASM), s, FLIP)
        s = _dot_scores(q2_2, centred(words, 2, 2, ASM), s, FLIP)
        s = _dot_scores(q2_3, centred(words, 2, 3, ASM), s, FLIP)
        s = _dot_scores(q2_4, centred(words, 2, 4, ASM), s, FLIP)
        s = _dot_scores(q2_5, centred(words, 2, 5, ASM), s, FLIP)
        s = _dot_scores(q2_6, centred(words, 2, 6, ASM), s, FLIP)
        s = _dot_scores(q2_7, centred(words, 2, 7, ASM), s, FLIP)
    if FLIP:
        return tl.trans(s)
    else:
        return s


@triton.jit
def _listed(tokens, positions, count: tl.constexpr, PAD: tl.constexpr, coded):
    """Which of ``tokens`` one row's pool holds."""
    slot = tl.arange(0, PAD)
    held = tl.load(positions + slot, mask=slot < count, other=-1).to(tl.int32)
    held = tl.where(held < coded, held, -1)
    return tl.sum((tokens[:, None] == held[None, :]).to(tl.int32), 1) > 0


@triton.jit
def _span(positions, count: tl.constexpr, PAD: tl.constexpr, coded):
    """First and last position that one row's pool holds."""
    slot = tl.arange(0, PAD)
    held = tl.load(positions + slot, mask=slot < count, other=-1).to(tl.int32)
    used = (held >= 0) & (held < coded)
    return tl.min(tl.where(used, held, 2147483647), 0), tl.max(tl.where(used, held, -1), 0)


@triton.jit
def _biased(s, bias, slots, live, rows_bias, BIAS: tl.constexpr):
    """Scores with the mask; -inf where a token is not live or hidden, whatever it holds.

    BIAS: 0 without a mask, 1 if it is the same for all rows, 2 if not.
    """
    if BIAS == 0:
        return tl.where(live[None, :], s, -float("inf"))
    elif BIAS == 1:
        add = tl.load(bias + slots, mask=live, other=-float("inf")) * 1.4426950408889634
        return tl.where((add == -float("inf"))[None, :], -float("inf"), s + add[None, :])
    else:
        where = bias + rows_bias[:, None] + slots[None, :]
        add = tl.load(where, mask=live[None, :], other=-float("inf")) * 1.4426950408889634
        return tl.where(add == -float("inf"), -float("inf"), s + add)


@triton.jit
def _gains(base, tokens, live, GROUPS: tl.constexpr):
    """The gains of tokens in one group of heads, 1 where there is none."""
    return tl.load(base + tokens * GROUPS, mask=live, other=1.0)


@triton.jit
def _headroom(gain):
    """At least log2 of a gain (float32) and 0: its exponent, read off its bits."""
    return tl.maximum((gain.to(tl.int32, bitcast=True) >> 23) - 126, 0).to(tl.float32)


@triton.jit
def _mix(p16, words, acc, decay, BITS: tl.constexpr, CODE: tl.constexpr, ASM: tl.constexpr):
    """Weighted sums over tokens of one code of each word, older ones decayed."""
    return tl.dot(p16, centred(words, BITS, CODE, ASM), acc * decay[:, None])


@triton.jit
def _store_sums(
    out, sums, rows, BITS: tl.constexpr, CODE: tl.constexpr, START: tl.constexpr,
    WIDTH: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Weighted sums of one code of each word, to their components."""
    column = components(BITS, CODE, START, WIDTH, PAD)
    mask = rows[:, None] & (tl.arange(0, PAD // 2) < WIDTH // 2)[None, :]
    tl.store(out + column[None, :], sums, mask=mask)


@triton.jit
def _product(a, b, acc, ASM: tl.constexpr):
    """``acc + a b``; in float32 under the interpreter, which takes bfloat16 for integers."""
    if ASM:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)


@triton.jit
def _over_codes(
    work, splits, q16, shift, q, k_codes, k_gain, v_codes, v_gain, bias, lengths, k_pos, v_pos,
    part, stats, capacity, bias_b, bias_h, bias_q, scale2,
    H: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    BLOCKS: tl.constexpr, KG: tl.constexpr, VG: tl.constexpr,
    KX: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, KW: tl.constexpr,
    KPITCH: tl.constexpr, K8: tl.constexpr, K4: tl.constexpr, K2: tl.constexpr,
    KP8: tl.constexpr, KP4: tl.constexpr, KP2: tl.constexpr, KGAIN: tl.constexpr,
    VX: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, VW: tl.constexpr,
    VPITCH: tl.constexpr, V8: tl.constexpr, V4: tl.constexpr, V2: tl.constexpr,
    VP8: tl.constexpr, VP4: tl.constexpr, VP2: tl.constexpr, VGAIN: tl.constexpr,
    EK: tl.constexpr, EKP: tl.constexpr, EV: tl.constexpr, EVP: tl.constexpr,
    BIAS: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, FLIP: tl.constexpr,
    WHOLE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One split of one group: ``part [B, G, splits + 1, BLOCKS * M, VW]``.

    WHOLE: the capacity is a multiple of N, so that no tile reaches past it.
    """
    block = work % BLOCKS
    split = work // BLOCKS % splits
    g = work // (BLOCKS * splits) % G
    b = work // (BLOCKS * splits * G)
    coded = tl.load(lengths).to(tl.int32)
    per = ((coded + N - 1) // N + splits - 1) // splits * N
    first = split * per
    last = tl.minimum(first + per, coded)

    m = tl.arange(0, M)
    row = block * M + m  # of the group's
    kept = (b * G + g).to(tl.int64) * (BLOCKS * M)  # rows of groups before
    gk, gv = g // (G // KG), g // (G // VG)
    if KX:
        k_base = k_codes + b.to(tl.int64) * capacity * KPITCH + gk * DK
        d = tl.arange(0, DKP)
        group_rows = H // G * ROWS
        q_row = q + ((b * G + g).to(tl.int64) * group_rows + row) * DK
        some = (row < group_rows)[:, None] & (d < DK)[None, :]
        qx = tl.load(q_row[:, None] + d[None, :], mask=some, other=0.0)
    else:
        k_base = k_codes + b.to(tl.int64) * capacity * KPITCH + gk * (K8 + K4 + K2)
        q_base = q16 + kept * KW
        at: tl.constexpr = K8 + 2 * K4
        centre = tl.full([M], 0.0, tl.float32)
        q8_0, q8_1, q4_0, q4_1, q4_2, q4_3 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        q2_0, q2_1, q2_2, q2_3, q2_4, q2_5, q2_6, q2_7 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        if K8:
            q8_0 = _load_q(q_base, row, 8, 0, 0, K8, KP8, KW, FLIP)
            q8_1 = _load_q(q_base, row, 8, 1, 0, K8, KP8, KW, FLIP)
            centre += _half_sum(q8_0, FLIP) + _half_sum(q8_1, FLIP)
        if K4:
            q4_0 = _load_q(q_base, row, 4, 0, K8, K4, KP4, KW, FLIP)
            q4_1 = _load_q(q_base, row, 4, 1, K8, K4, KP4, KW, FLIP)
            q4_2 = _load_q(q_base, row, 4, 2, K8, K4, KP4, KW, FLIP)
            q4_3 = _load_q(q_base, row, 4, 3, K8, K4, KP4, KW, FLIP)
            centre += _half_sum(q4_0, FLIP) + _half_sum(q4_1, FLIP)
            centre += _half_sum(q4_2, FLIP) + _half_sum(q4_3, FLIP)
        if K2:
            q2_0 = _load_q(q_base, row, 2, 0, at, K2, KP2, KW, FLIP)
            q2_1 = _load_q(q_base, row, 2, 1, at, K2, KP2, KW, FLIP)
            q2_2 = _load_q(q_base, row, 2, 2, at, K2, KP2, KW, FLIP)
            q2_3 = _load_q(q_base, row, 2, 3, at, K2, KP2, KW, FLIP)
            q2_4 = _load_q(q_base, row, 2, 4, at, K2, KP2, KW, FLIP)
            q2_5 = _load_q(q_base, row, 2, 5, at, K2, KP2, KW, FLIP)
            q2_6 = _load_q(q_base, row, 2, 6, at, K2, KP2, KW, FLIP)
            q2_7 = _load_q(q_base, row, 2, 7, at, K2, KP2, KW, FLIP)
            centre += _half_sum(q2_0, FLIP) + _half_sum(q2_1, FLIP)
            centre += _half_sum(q2_2, FLIP) + _half_sum(q2_3, FLIP)
            centre += _half_sum(q2_4, FLIP) + _half_sum(q2_5, FLIP)
            centre += _half_sum(q2_6, FLIP) + _half_sum(q2_7, FLIP)
        # The same for all coded tokens of a row, so it is added to their largest score only.
        mean = tl.load(shift + kept + row)
        if not KGAIN:
            mean += centre
    if VX:
        v_base = v_codes + b.to(tl.int64) * capacity * VPITCH + gv * DV
    else:
        v_base = v_codes + b.to(tl.int64) * capacity * VPITCH + gv * (V8 + V4 + V2)
    rows_bias = (g * (H // G) * (ROWS // Q) + row // Q) * bias_h + row % Q * bias_q
    bias_row = bias + b.to(tl.int64) * bias_b

    nearest, farthest = 2147483647, -1
    if EK:
        lo, hi = _span(k_pos + b * EK, EK, EKP, coded)
        nearest, farthest = tl.minimum(nearest, lo), tl.maximum(farthest, hi)
    if EV:
        lo, hi = _span(v_pos + b * EV, EV, EVP, coded)
        nearest, farthest = tl.minimum(nearest, lo), tl.maximum(farthest, hi)

    top = tl.full([M], -float("inf"), tl.float32)
    mass = tl.full([M, N], 0.0, tl.float32)  # summed over tokens after the loop: no exchange in it
    gained = tl.full([M, N], 0.0, tl.float32)
    if VX:
        a16 = tl.full([M, DVP], 0.0, tl.float32)
    if V8:
        a8_0 = tl.full([M, VP8 // 2], 0.0, tl.float32)
        a8_1 = tl.full([M, VP8 // 2], 0.0, tl.float32)
    if V4:
        a4_0 = tl.full([M, VP4 // 2], 0.0, tl.float32)
        a4_1 = tl.full([M, VP4 // 2], 0.0, tl.float32)
        a4_2 = tl.full([M, VP4 // 2], 0.0, tl.float32)
        a4_3 = tl.full([M, VP4 // 2], 0.0, tl.float32)
    if V2:
        a2_0 = tl.full([M, VP2 // 2], 0.0, tl.float32)
        a2_1 = tl.full([M, VP2 // 2], 0.0, tl.float32)
        a2_2 = tl.full([M, VP2 // 2], 0.0, tl.float32)
        a2_3 = tl.full([M, VP2 // 2], 0.0, tl.float32)
        a2_4 = tl.full([M, VP2 // 2], 0.0, tl.float32)
        a2_5 = tl.full([M, VP2 // 2], 0.0, tl.float32)
        a2_6 = tl.full([M, VP2 // 2], 0.0, tl.float32)
        a2_7 = tl.full([M, VP2 // 2], 0.0, tl.float32)

    # Gains are too narrow for asynchronous copies: they are loaded one tile ahead by hand.
    n = first + tl.arange(0, N)
    if KGAIN:
        k_gains = k_gain + b.to(tl.int64) * capacity * KG + gk
        next_t = _gains(k_gains, n, n < last, KG)
    if VGAIN:
        v_gains = v_gain + b.to(tl.int64) * capacity * VG + gv
        next_u = _gains(v_gains, n, n < last, VG)

    for start in tl.range(first, last, N, num_stages=STAGES):
        n = start + tl.arange(0, N)
        inside = n < last
        live = inside
        if EK + EV:  # noqa: SIM102  (known when the kernel is compiled, unlike the other)
            if (start <= farthest) & (start + N > nearest):
                if EK:
                    live = live & (_listed(n, k_pos + b * EK, EK, EKP, coded) == 0)
                if EV:
                    live = live & (_listed(n, v_pos + b * EV, EV, EVP, coded) == 0)
        if KX:
            in_keys = inside[:, None] & (d < DK)[None, :]
            k = tl.load(k_base + n[:, None] * KPITCH + d[None, :], mask=in_keys, other=0.0)
            s = _product(qx, tl.trans(k), tl.full([M, N], 0.0, tl.float32), ASM) * scale2
        else:
            s = _code_scores(
                q8_0, q8_1, q4_0, q4_1, q4_2, q4_3,
                q2_0, q2_1, q2_2, q2_3, q2_4, q2_5, q2_6, q2_7, k_base, n, inside,
                M, N, KPITCH, K8, K4, K2, KP8, KP4, KP2, FLIP, WHOLE, ASM,
            )  # fmt: skip
            if KGAIN:
                t = next_t.to(tl.float32)
                next_t = _gains(k_gains, n + N, n + N < last, KG)
                s = (s + centre[:, None]) * t[None, :]
        s = _biased(s, bias_row, n, live, rows_bias, BIAS)
        if VGAIN:
            u = next_u.to(tl.float32)
            next_u = _gains(v_gains, n + N, n + N < last, VG)
            # p * u must fit float16 as well as p
            new = tl.maximum(top, tl.max(s + _headroom(u)[None, :], 1))
        else:
            new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        decay = tl.exp2(top - base)
        p = tl.exp2(s - (base - SHIFT)[:, None])
        top = new
        mass = mass * decay[:, None] + p
        if VGAIN:
            p = p * u[None, :]
            gained = gained * decay[:, None] + p
        if VX:
            dv = tl.arange(0, DVP)
            in_values = inside[:, None] & (dv < DV)[None, :]
            v = tl.load(v_base + n[:, None] * VPITCH + dv[None, :], mask=in_values, other=0.0)
            a16 = _product(p.to(v.dtype), v, a16 * decay[:, None], ASM)
        else:
            p16 = p.to(tl.float16)
        if V8:
            words = load_run(v_base, n, inside, VPITCH, 0, V8, VP8, WHOLE)
            a8_0 = _mix(p16, words, a8_0, decay, 8, 0, ASM)
            a8_1 = _mix(p16, words, a8_1, decay, 8, 1, ASM)
        if V4:
            words = load_run(v_base, n, inside, VPITCH, V8, V4, VP4, WHOLE)
            a4_0 = _mix(p16, words, a4_0, decay, 4, 0, ASM)
            a4_1 = _mix(p16, words, a4_1, decay, 4, 1, ASM)
            a4_2 = _mix(p16, words, a4_2, decay, 4, 2, ASM)
            a4_3 = _mix(p16, words, a4_3, decay, 4, 3, ASM)
        if V2:
            words = load_run(v_base, n, inside, VPITCH, V8 + V4, V2, VP2, WHOLE)
            a2_0 = _mix(p16, words, a2_0, decay, 2, 0, ASM)
            a2_1 = _mix(p16, words, a2_1, decay, 2, 1, ASM)
            a2_2 = _mix(p16, words, a2_2, decay, 2, 2, ASM)
            a2_3 = _mix(p16, words, a2_3, decay, 2, 3, ASM)
            a2_4 = _mix(p16, words, a2_4, decay, 2, 4, ASM)
            a2_5 = _mix(p16, words, a2_5, decay, 2, 5, ASM)
            a2_6 = _mix(p16, words, a2_6, decay, 2, 6, ASM)
            a2_7 = _mix(p16, words, a2_7, decay, 2, 7, ASM)

    here = ((b * G + g).to(tl.int64) * (splits + 1) + split) * (BLOCKS * M) + row
    total = tl.sum(mass, 1)
    if not KX:
        top += mean
    tl.store(stats + here * 4, top)
    tl.store(stats + here * 4 + 1, total)
    tl.store(stats + here * 4 + 2, total)
    if VGAIN:
        tl.store(stats + here * 4 + 3, tl.sum(gained, 1))
    else:
        tl.store(stats + here * 4 + 3, total)
    out = part + here[:, None] * VW
    if VX:
        tl.store(out + tl.arange(0, DVP)[None, :], a16)
    all_rows = tl.full([M], 1, tl.int1)
    if V8:
        _store_sums(out, a8_0, all_rows, 8, 0, 0, V8, VP8)
        _store_sums(out, a8_1, all_rows, 8, 1, 0, V8, VP8)
    if V4:
        _store_sums(out, a4_0, all_rows, 4, 0, V8, V4, VP4)
        _store_sums(out, a4_1, all_rows, 4, 1, V8, V4, VP4)
        _store_sums(out, a4_2, all_rows, 4, 2, V8, V4, VP4)
        _store_sums(out, a4_3, all_rows, 4, 3, V8, V4, VP4)
    if V2:
        _store_sums(out, a2_0, all_rows, 2, 0, V8 + 2 * V4, V2, VP2)
        _store_sums(out, a2_1, all_rows, 2, 1, V8 + 2 * V4, V2, VP2)
        _store_sums(out, a2_2, all_rows, 2, 2, V8 + 2 * V4, V2, VP2)
        _store_sums(out, a2_3, all_rows, 2, 3, V8 + 2 * V4, V2, VP2)
        _store_sums(out, a2_4, all_rows, 2, 4, V8 + 2 * V4, V2, VP2)
        _store_sums(out, a2_5, all_rows, 2, 5, V8 + 2 * V4, V2, VP2)
        _store_sums(out, a2_6, all_rows, 2, 6, V8 + 2 * V4, V2, VP2)
        _store_sums(out, a2_7, all_rows, 2, 7, V8 + 2 * V4, V2, VP2)


@triton.jit
def _over_exact(
    work, splits, q16, shift, q, k_codes, k_gain, v_codes, v_gain, bias, lengths, k_pos, v_pos,
    k_pool, v_pool, k_ring, v_ring, part, stats, exact, capacity, bias_b, bias_h, bias_q, scale2,
    H: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    BLOCKS: tl.constexpr, KG: tl.constexpr, VG: tl.constexpr,
    KX: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, KW: tl.constexpr,
    KPITCH: tl.constexpr, K8: tl.constexpr, K4: tl.constexpr, K2: tl.constexpr,
    KP8: tl.constexpr, KP4: tl.constexpr, KP2: tl.constexpr, KGAIN: tl.constexpr,
    VX: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, VW: tl.constexpr,
    VPITCH: tl.constexpr, V8: tl.constexpr, V4: tl.constexpr, V2: tl.constexpr,
    VP8: tl.constexpr, VP4: tl.constexpr, VP2: tl.constexpr, VGAIN: tl.constexpr,
    EK: tl.constexpr, EKP: tl.constexpr, EV: tl.constexpr, EVP: tl.constexpr,
    RING: tl.constexpr, BIAS: tl.constexpr, X: tl.constexpr, XBLOCKS: tl.constexpr,
    XN: tl.constexpr, LISTED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Ring and pool of one KV head, X of its rows: ``exact [B, H, ROWS, DV]``, slot ``splits``."""
    block = work % XBLOCKS
    h = work // XBLOCKS % H
    b = work // (XBLOCKS * H)
    head = (b * H + h).to(tl.int64)
    coded = tl.load(lengths).to(tl.int32)
    recent = tl.load(lengths + 1).to(tl.int32)

    r = block * X + tl.arange(0, X)  # of the head's
    d, dv = tl.arange(0, DKP), tl.arange(0, DVP)
    some = (r < ROWS)[:, None] & (d < DK)[None, :]
    qx = tl.load(q + (head * ROWS + r)[:, None] * DK + d[None, :], mask=some, other=0.0)
    rows_bias = (h * (ROWS // Q) + r // Q) * bias_h + r % Q * bias_q
    bias_row = bias + b.to(tl.int64) * bias_b

    top = tl.full([X], -float("inf"), tl.float32)
    mass = tl.full([X], 0.0, tl.float32)
    acc = tl.full([X, DVP], 0.0, tl.float32)
    for start in tl.range(0, recent, XN, num_stages=2):
        n = start + tl.arange(0, XN)
        live = n < recent
        cell = (head * RING + n)[:, None]
        k = tl.load(
            k_ring + cell * DK + d[None, :], mask=live[:, None] & (d < DK)[None, :], other=0.0
        )
        s = _product(qx, tl.trans(k), tl.full([X, XN], 0.0, tl.float32), ASM) * scale2
        s = _biased(s, bias_row, capacity + n, live, rows_bias, BIAS)
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        decay = tl.exp2(top - base)
        p = tl.exp2(s - (base - SHIFT)[:, None])
        top = new
        mass = mass * decay + tl.sum(p, 1)
        v = tl.load(
            v_ring + cell * DV + dv[None, :], mask=live[:, None] & (dv < DV)[None, :], other=0.0
        )
        acc = _product(p.to(v.dtype), v, acc * decay[:, None], ASM)

    # Its rows among those of its group, in the slot behind the splits.
    g = h // (H // G)
    in_group = h % (H // G) * ROWS + r
    group = (b * G + g).to(tl.int64)
    slot = (group * (splits + 1) + splits) * (BLOCKS * M) + in_group
    coded_mass = tl.full([X], 0.0, tl.float32)
    gained = tl.full([X], 0.0, tl.float32)
    if EK + EV:
        # Pool tokens: slots of the keys' pool, then those of the values' that it lacks.
        i = tl.arange(0, LISTED)
        token = tl.full([LISTED], -1, tl.int32)
        if EK:
            token = tl.load(k_pos + b * EK + i, mask=i < EK, other=-1).to(tl.int32)
        if EV:
            only = tl.load(v_pos + b * EV + i - EK, mask=(i >= EK) & (i < EK + EV), other=-1)
            only = only.to(tl.int32)
            if EK:
                only = tl.where(_listed(only, k_pos + b * EK, EK, EKP, coded), -1, only)
            token = tl.where(i < EK, token, only)
        live = (token >= 0) & (token < coded)
        s = tl.full([X, LISTED], 0.0, tl.float32)
        if EK:
            k_live = live & (i < EK)
            k = tl.load(
                k_pool + (head * EK + i)[:, None] * DK + d[None, :],
                mask=k_live[:, None] & (d < DK)[None, :], other=0.0,
            )  # fmt: skip
            s = _product(qx, tl.trans(k), s, ASM) * scale2
        if EV:
            k_live = live & (i >= EK)
            gk = g // (G // KG)
            if KX:
                k_base = k_codes + b.to(tl.int64) * capacity * KPITCH + gk * DK
                k = tl.load(
                    k_base + token[:, None] * KPITCH + d[None, :],
                    mask=k_live[:, None] & (d < DK)[None, :], other=0.0,
                )  # fmt: skip
                other = tl.full([X, LISTED], 0.0, tl.float32)
                other = _product(qx, tl.trans(k), other, ASM) * scale2
            else:
                k_base = k_codes + b.to(tl.int64) * capacity * KPITCH + gk * (K8 + K4 + K2)
                own = group * (BLOCKS * M) + tl.where(r < ROWS, in_group, 0)
                at: tl.constexpr = K8 + 2 * K4
                centre = tl.full([X], 0.0, tl.float32)
                q8_0, q8_1, q4_0, q4_1, q4_2, q4_3 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
                q2_0, q2_1, q2_2, q2_3, q2_4, q2_5, q2_6, q2_7 = (
                    0.0,
                    0.0,
                    0.0,
                    0.0,
                    0.0,
                    0.0,
                    0.0,
                    0.0,
                )
                if K8:
                    q8_0 = _load_q(q16, own, 8, 0, 0, K8, KP8, KW, False)
                    q8_1 = _load_q(q16, own, 8, 1, 0, K8, KP8, KW, False)
                    centre += _half_sum(q8_0, False) + _half_sum(q8_1, False)
                if K4:
                    q4_0 = _load_q(q16, own, 4, 0, K8, K4, KP4, KW, False)
                    q4_1 = _load_q(q16, own, 4, 1, K8, K4, KP4, KW, False)
                    q4_2 = _load_q(q16, own, 4, 2, K8, K4, KP4, KW, False)
                    q4_3 = _load_q(q16, own, 4, 3, K8, K4, KP4, KW, False)
                    centre += _half_sum(q4_0, False) + _half_sum(q4_1, False)
                    centre += _half_sum(q4_2, False) + _half_sum(q4_3, False)
                if K2:
                    q2_0 = _load_q(q16, own, 2, 0, at, K2, KP2, KW, False)
                    q2_1 = _load_q(q16, own, 2, 1, at, K2, KP2, KW, False)
                    q2_2 = _load_q(q16, own, 2, 2, at, K2, KP2, KW, False)
                    q2_3 = _load_q(q16, own, 2, 3, at, K2, KP2, KW, False)
                    q2_4 = _load_q(q16, own, 2, 4, at, K2, KP2, KW, False)
                    q2_5 = _load_q(q16, own, 2, 5, at, K2, KP2, KW, False)
                    q2_6 = _load_q(q16, own, 2, 6, at, K2, KP2, KW, False)
                    q2_7 = _load_q(q16, own, 2, 7, at, K2, KP2, KW, False)
                    centre += _half_sum(q2_0, False) + _half_sum(q2_1, False)
                    centre += _half_sum(q2_2, False) + _half_sum(q2_3, False)
                    centre += _half_sum(q2_4, False) + _half_sum(q2_5, False)
                    centre += _half_sum(q2_6, False) + _half_sum(q2_7, False)
                other = _code_scores(
                    q8_0, q8_1, q4_0, q4_1, q4_2, q4_3,
                    q2_0, q2_1, q2_2, q2_3, q2_4, q2_5, q2_6, q2_7, k_base, token, k_live,
                    X, LISTED, KPITCH, K8, K4, K2, KP8, KP4, KP2, False, False, ASM,
                )  # fmt: skip
                other = other + centre[:, None]
                if KGAIN:
                    k_gains = k_gain + b.to(tl.int64) * capacity * KG + gk
                    t = _gains(k_gains, token, k_live, KG).to(tl.float32)
                    other = other * t[None, :]
                other = other + tl.load(shift + own)[:, None]
            s = tl.where((i < EK)[None, :], s, other)
        s = _biased(s, bias_row, token, live, rows_bias, BIAS)

        by_code = live
        if EV:
            by_code = live & (_listed(token, v_pos + b * EV, EV, EVP, coded) == 0)
        gv = g // (G // VG)
        u = tl.full([LISTED], 1.0, tl.float32)
        if VGAIN:
            v_gains = v_gain + b.to(tl.int64) * capacity * VG + gv
            u = _gains(v_gains, token, by_code, VG).to(tl.float32)
        new = tl.maximum(top, tl.max(s + _headroom(u)[None, :], 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        decay = tl.exp2(top - base)
        p = tl.exp2(s - (base - SHIFT)[:, None])
        top = new
        mass = mass * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        if EV:
            e = tl.arange(0, EVP)
            held = tl.load(v_pos + b * EV + e, mask=e < EV, other=-1).to(tl.int32)
            held = tl.where(held < coded, held, -1)
            v = tl.load(
                v_pool + (head * EV + e)[:, None] * DV + dv[None, :],
                mask=(held >= 0)[:, None] & (dv < DV)[None, :], other=0.0,
            )  # fmt: skip
            same = (token[:, None] == held[None, :]) & live[:, None]  # [LISTED, EVP]
            by_slot = tl.full([X, EVP], 0.0, tl.float32)
            same = same.to(tl.float32).to(v.dtype)
            by_slot = _product(p.to(v.dtype), same, by_slot, ASM)  # one term each: exact
            acc = _product(by_slot.to(v.dtype), v, acc, ASM)
        w = tl.where(by_code[None, :], p, 0.0)
        coded_mass = tl.sum(w, 1)
        w = w * u[None, :]
        gained = tl.sum(w, 1)
        out = part + slot[:, None] * VW
        mine = r < ROWS
        if VX:
            v_base = v_codes + b.to(tl.int64) * capacity * VPITCH + gv * DV
            v = tl.load(
                v_base + token[:, None] * VPITCH + dv[None, :],
                mask=by_code[:, None] & (dv < DV)[None, :], other=0.0,
            )  # fmt: skip
            acc = _product(w.to(v.dtype), v, acc, ASM)
        else:
            v_base = v_codes + b.to(tl.int64) * capacity * VPITCH + gv * (V8 + V4 + V2)
            w16 = w.to(tl.float16)
            if V8:
                words = load_run(v_base, token, by_code, VPITCH, 0, V8, VP8, False)
                for c in tl.static_range(2):
                    sums = tl.dot(w16, centred(words, 8, c, ASM))
                    _store_sums(out, sums, mine, 8, c, 0, V8, VP8)
            if V4:
                words = load_run(v_base, token, by_code, VPITCH, V8, V4, VP4, False)
                for c in tl.static_range(4):
                    sums = tl.dot(w16, centred(words, 4, c, ASM))
                    _store_sums(out, sums, mine, 4, c, V8, V4, VP4)
            if V2:
                words = load_run(v_base, token, by_code, VPITCH, V8 + V4, V2, VP2, False)
                for c in tl.static_range(8):
                    sums = tl.dot(w16, centred(words, 2, c, ASM))
                    _store_sums(out, sums, mine, 2, c, V8 + 2 * V4, V2, VP2)

    tl.store(stats + slot * 4, top, mask=r < ROWS)
    tl.store(stats + slot * 4 + 1, mass, mask=r < ROWS)
    tl.store(stats + slot * 4 + 2, coded_mass, mask=r < ROWS)
    tl.store(stats + slot * 4 + 3, gained, mask=r < ROWS)
    where = exact + (head * ROWS + r)[:, None] * DV + dv[None, :]
    tl.store(where, acc, mask=(r < ROWS)[:, None] & (dv < DV)[None, :])


@triton.jit
def attend_kernel(
    q16, shift, q, k_codes, k_gain, v_codes, v_gain, bias, lengths, k_pos, v_pos,
    k_pool, v_pool, k_ring, v_ring, part, stats, exact,
    splits, exact_programs, capacity, bias_b, bias_h, bias_q, scale2,
    H: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    BLOCKS: tl.constexpr, KG: tl.constexpr, VG: tl.constexpr,
    KX: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, KW: tl.constexpr,
    KPITCH: tl.constexpr, K8: tl.constexpr, K4: tl.constexpr, K2: tl.constexpr,
    KP8: tl.constexpr, KP4: tl.constexpr, KP2: tl.constexpr, KGAIN: tl.constexpr,
    VX: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, VW: tl.constexpr,
    VPITCH: tl.constexpr, V8: tl.constexpr, V4: tl.constexpr, V2: tl.constexpr,
    VP8: tl.constexpr, VP4: tl.constexpr, VP2: tl.constexpr, VGAIN: tl.constexpr,
    EK: tl.constexpr, EKP: tl.constexpr, EV: tl.constexpr, EVP: tl.constexpr,
    RING: tl.constexpr, BIAS: tl.constexpr, X: tl.constexpr, XBLOCKS: tl.constexpr,
    XN: tl.constexpr, LISTED: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    FLIP: tl.constexpr, WHOLE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Both kinds of programs. The names of the constants: see ``plan.py``."""
    work = tl.program_id(0)
    scale2 = tl.full([], scale2, tl.float32)  # Inductor passes float64
    if work < exact_programs:
        _over_exact(
            work, splits, q16, shift, q, k_codes, k_gain, v_codes, v_gain, bias, lengths,
            k_pos, v_pos, k_pool, v_pool, k_ring, v_ring, part, stats, exact,
            capacity, bias_b, bias_h, bias_q, scale2,
            H, ROWS, Q, G, M, BLOCKS, KG, VG,
            KX, DK, DKP, KW, KPITCH, K8, K4, K2, KP8, KP4, KP2, KGAIN,
            VX, DV, DVP, VW, VPITCH, V8, V4, V2, VP8, VP4, VP2, VGAIN,
            EK, EKP, EV, EVP, RING, BIAS, X, XBLOCKS, XN, LISTED, ASM,
        )  # fmt: skip
    else:
        _over_codes(
            work - exact_programs, splits, q16, shift, q, k_codes, k_gain, v_codes, v_gain, bias,
            lengths, k_pos, v_pos, part, stats, capacity, bias_b, bias_h, bias_q, scale2,
            H, ROWS, Q, G, M, BLOCKS, KG, VG,
            KX, DK, DKP, KW, KPITCH, K8, K4, K2, KP8, KP4, KP2, KGAIN,
            VX, DV, DVP, VW, VPITCH, V8, V4, V2, VP8, VP4, VP2, VGAIN,
            EK, EKP, EV, EVP, BIAS, N, STAGES, FLIP, WHOLE, ASM,
        )  # fmt: skip
