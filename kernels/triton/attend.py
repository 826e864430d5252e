"""Packed attention of one decode step: one launch over codes, pool and ring.

Programs of three kinds share the launch, or those over codes do the others' work, too:

- ``over_codes``: one split of the coded tokens for one group of KV heads. All query rows of the
  group (query heads x queries) meet one tile of codes, so that each code is read once. Keys that
  were coded before their rotary embedding are rebuilt instead (``turned.py``), by KV head.
- ``over_ring``, ``over_pool``: ring and pool of one KV head.

Each leaves what softmax needs to be put together later (``merge.py``): a reference m, the masses
and the weighted sums, all relative to 2^m. Scores are in units of log2. The maths is in
``codec/transform.py``; splitting over tokens and merging by log-sum-exp is Flash-Decoding (Dao et
al., 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .over_codes import over_codes
from .over_pool import over_pool
from .over_ring import over_ring
from .shares import own_pieces


@triton.jit
def over_exact(
    work, apart, splits, tails, q16, shift, centre, q, k_codes, k_gain, v_codes, v_gain, bias,
    lengths, k_pos, v_pos, k_basis, k_offsets, k_spans, k_waves, k_pool, v_pool, k_ring, v_ring,
    lacks, part, stats, exact, capacity, bias_b, bias_h, bias_q, scale2,
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
    STATS: tl.constexpr, EXACTS: tl.constexpr, RING: tl.constexpr, BIAS: tl.constexpr,
    CAP: tl.constexpr, X: tl.constexpr, XBLOCKS: tl.constexpr, XN: tl.constexpr,
    LISTED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Ring and pool of X rows of one head, or one of them, if they are ``apart``."""
    if work % apart == 0:
        over_ring(
            work // apart, splits + tails, q, bias, lengths, k_ring, v_ring, stats, exact,
            capacity, bias_b, bias_h, bias_q, scale2,
            H, ROWS, Q, G, M, BLOCKS, DK, DKP, DV, DVP,
            RING, BIAS, CAP, X, XBLOCKS, XN, STATS, EXACTS, ASM,
        )  # fmt: skip
    if EK + EV:  # noqa: SIM102  (known when the kernel is compiled)
        if work % apart == apart - 1:
            over_pool(
                work // apart, splits, q16, shift, centre, q, k_codes, k_gain,
                v_codes, v_gain, bias, lengths, k_pos, v_pos, k_basis, k_offsets, k_spans,
                k_waves, k_pool, v_pool, lacks, part, stats, exact, capacity,
                bias_b, bias_h, bias_q, scale2,
                H, ROWS, Q, G, M, BLOCKS, KG, VG,
                KX, DK, DKP, KW, KPITCH, K8, K4, K2, KP8, KP4, KP2, KGAIN, KROT, KINTER, KHALF,
                CHUNKS, CHUNKSP,
                VX, DV, DVP, VW, VPITCH, V8, V4, V2, VP8, VP4, VP2, VGAIN,
                EK, EKP, EV, EVP, STATS, BIAS, CAP, X, XBLOCKS, LISTED, ASM,
            )  # fmt: skip


@triton.jit
def attend_kernel(
    q16, shift, centre, table, q, k_codes, k_gain, v_codes, v_gain, bias, lengths, k_pos, v_pos,
    k_basis, k_offsets, k_spans, k_waves, k_pool, v_pool, k_ring, v_ring,
    lacks, entries, counts, k_scores, v_scores, part, stats, exact,
    splits, tails, apart, exact_programs, pieces, capacity, k_rows, v_rows, length,
    k_slots, v_slots, bias_b, bias_h, bias_q, scale2,
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
    LIST: tl.constexpr, STATS: tl.constexpr, EXACTS: tl.constexpr, RING: tl.constexpr,
    BIAS: tl.constexpr, CAP: tl.constexpr,
    X: tl.constexpr, XBLOCKS: tl.constexpr, XN: tl.constexpr, LISTED: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr, PIECE: tl.constexpr, BESIDE: tl.constexpr, WHOLE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """All kinds of programs. Constants: ``plan.py``.

    CAP: the softcap of the scores; 0: there is none. exact_programs: over ring and pool; 0: those
    over codes do theirs, ``pieces`` in each group (``shares.py``). apart: 2 if ring and pool of a
    head have a program each, 1 if they share one. length: entries of a sequence (``listing.py``);
    tails: programs over those of slots, behind the splits.
    """
    program = tl.program_id(0)
    scale2 = tl.full([], scale2, tl.float32)  # Inductor passes float64
    piece, last_piece = program, program + 1
    if program >= exact_programs:
        work = program - exact_programs
        if LIST:
            of_slots = work // BLOCKS % (splits + tails) >= splits
        else:
            of_slots = False
        if of_slots:
            over_codes(
                work, splits, tails, pieces, q16, shift, centre, table, q, k_codes, k_gain,
                v_codes, v_gain, bias, lengths, k_pos, v_pos, k_basis, k_offsets, k_spans,
                k_waves, lacks, entries, counts, k_scores, v_scores, part, stats,
                k_rows, v_rows, length, k_slots, v_slots, bias_b, bias_h, bias_q, scale2,
                H, ROWS, Q, G, M, BLOCKS, KG, VG,
                KX, DK, DKP, KW, KPITCH, K8, K4, K2, KP8, KP4, KP2, KGAIN, KROT, KINTER, KHALF,
                CHUNKS, CHUNKSP,
                VX, DV, DVP, VW, VPITCH, V8, V4, V2, VP8, VP4, VP2, VGAIN, VS8, VS4, VS2,
                EK, EKP, EV, EVP, 2, STATS, EXACTS, BIAS, CAP, N, STAGES, PIECE, WHOLE, ASM,
            )  # fmt: skip
        else:
            over_codes(
                work, splits, tails, pieces, q16, shift, centre, table, q, k_codes, k_gain,
                v_codes, v_gain, bias, lengths, k_pos, v_pos, k_basis, k_offsets, k_spans,
                k_waves, lacks, entries, counts, k_scores, v_scores, part, stats,
                k_rows, v_rows, length, k_slots, v_slots, bias_b, bias_h, bias_q, scale2,
                H, ROWS, Q, G, M, BLOCKS, KG, VG,
                KX, DK, DKP, KW, KPITCH, K8, K4, K2, KP8, KP4, KP2, KGAIN, KROT, KINTER, KHALF,
                CHUNKS, CHUNKSP,
                VX, DV, DVP, VW, VPITCH, V8, V4, V2, VP8, VP4, VP2, VGAIN, VS8, VS4, VS2,
                EK, EKP, EV, EVP, LIST, STATS, EXACTS, BIAS, CAP, N, STAGES, PIECE, WHOLE,
                ASM,
            )  # fmt: skip
        if BESIDE:
            group = work // (BLOCKS * (splits + tails))
            split = work // BLOCKS % (splits + tails)
            piece, last_piece = own_pieces(pieces, split, splits, work % BLOCKS, BLOCKS)
            # Inductor passes int64 where it cannot prove less.
            piece = (piece + group * pieces).to(tl.int32)
            last_piece = (last_piece + group * pieces).to(tl.int32)
    if BESIDE:
        for one in range(piece, last_piece, BLOCKS):
            over_exact(
                one, apart, splits, tails, q16, shift, centre, q, k_codes, k_gain, v_codes,
                v_gain, bias, lengths, k_pos, v_pos, k_basis, k_offsets, k_spans, k_waves, k_pool,
                v_pool, k_ring, v_ring, lacks, part, stats, exact, capacity, bias_b, bias_h, bias_q,
                scale2, H, ROWS, Q, G, M, BLOCKS, KG, VG,
                KX, DK, DKP, KW, KPITCH, K8, K4, K2, KP8, KP4, KP2, KGAIN, KROT, KINTER, KHALF,
                CHUNKS, CHUNKSP,
                VX, DV, DVP, VW, VPITCH, V8, V4, V2, VP8, VP4, VP2, VGAIN,
                EK, EKP, EV, EVP, STATS, EXACTS, RING, BIAS, CAP, X, XBLOCKS, XN, LISTED, ASM,
            )  # fmt: skip
    elif program < exact_programs:  # a loop would take registers from those over codes
        over_exact(
            program, apart, splits, tails, q16, shift, centre, q, k_codes, k_gain, v_codes,
            v_gain, bias, lengths, k_pos, v_pos, k_basis, k_offsets, k_spans, k_waves, k_pool,
            v_pool, k_ring, v_ring, lacks, part, stats, exact, capacity, bias_b, bias_h, bias_q,
            scale2, H, ROWS, Q, G, M, BLOCKS, KG, VG,
            KX, DK, DKP, KW, KPITCH, K8, K4, K2, KP8, KP4, KP2, KGAIN, KROT, KINTER, KHALF,
            CHUNKS, CHUNKSP,
            VX, DV, DVP, VW, VPITCH, V8, V4, V2, VP8, VP4, VP2, VGAIN,
            EK, EKP, EV, EVP, STATS, EXACTS, RING, BIAS, CAP, X, XBLOCKS, XN, LISTED, ASM,
        )  # fmt: skip
