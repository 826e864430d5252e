"""The launch before that over tokens, where rows are listed: entries, and scores of slots."""

from __future__ import annotations

import triton
import triton.language as tl

from .listing import list_rows, list_slots
from .slots import score_slots


@triton.jit
def prepare_kernel(
    q, k_ranks, v_ranks, k_totals, k_pos, v_pos, k_pool, v_pool, lengths, found, entries, counts,
    k_scores, v_scores, capacity, length, k_slots, v_slots, batch, tiles, slot_tiles, scale2,
    H: tl.constexpr, ROWS: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, X: tl.constexpr, XBLOCKS: tl.constexpr,
    KPLANES: tl.constexpr, VPLANES: tl.constexpr, KPLANE: tl.constexpr, VPLANE: tl.constexpr,
    DROPS: tl.constexpr, T: tl.constexpr, E: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Programs that list slots, those that list rows, and those that score slots.

    Leaves ``entries [B, 3, length]`` and ``counts [B]`` int32, rows of keys (``listing.py``), and
    what ``slots.py`` says.
    """
    work = tl.program_id(0)
    scale2 = tl.full([], scale2, tl.float32)  # Inductor passes float64
    coded = tl.minimum(tl.load(lengths).to(tl.int32), capacity)
    of_slots = batch * slot_tiles
    if work < of_slots:
        list_slots(
            (work // slot_tiles).to(tl.int64), work % slot_tiles, k_ranks, v_ranks,
            k_pos, v_pos, k_pool, v_pool, coded, entries, capacity, length, k_slots, v_slots,
            H, DK, DKP, DV, DVP, KPLANES, VPLANES, KPLANE, VPLANE, DROPS, E,
        )  # fmt: skip
    elif work < of_slots + batch * tiles:
        at = work - of_slots
        list_rows(
            (at // tiles).to(tl.int64), at % tiles, k_ranks, v_ranks, k_totals, k_pos, v_pos,
            coded, found, entries, counts, capacity, length, k_slots, v_slots,
            KPLANES, VPLANES, KPLANE, VPLANE, T, E,
        )  # fmt: skip
    else:
        at = work - of_slots - batch * tiles
        score_slots(
            at // slot_tiles, at % slot_tiles, q, k_pos, k_pool, coded, k_scores, v_scores,
            k_slots, v_slots, scale2, H, ROWS, DK, DKP, X, XBLOCKS, E, ASM,
        )  # fmt: skip
