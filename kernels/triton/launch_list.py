"""The launch that lists rows and slots: ``prepare_kernel``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .calls import INTERPRETED, kernel
from .coded import Coded, Ranks
from .listing import TOKENS_LISTED
from .plan import EXACT_ROWS, power
from .prepare import prepare_kernel
from .rows import SLOTS_AT_ONCE
from .step import Step


class Listed(NamedTuple):
    """What ``prepare_kernel`` leaves: entries, their number, scores by slots of both pools."""

    entries: Tensor
    counts: Tensor
    k_scores: Tensor
    v_scores: Tensor


def list_rows(
    step: Step, of_keys: Coded, k_ranks: Ranks | None, v_ranks: Ranks | None, kind: int, drops: bool
) -> Listed:
    """Which rows belong together, of all tokens or of a kind. drops: some may be dropped."""
    q, keys, values, lengths = step.q, step.keys, step.values, step.lengths
    batch, q_heads, queries, dim = q.shape[0], *(int(n) for n in q.shape[1:])
    capacity, heads, v_dim = keys.capacity, int(keys.ring.shape[1]), int(values.ring.shape[3])
    k_slots, v_slots = keys.pool.shape[2], values.pool.shape[2]
    length = of_keys.codes.shape[1] + k_slots + v_slots
    tiles = (capacity + TOKENS_LISTED - 1) // TOKENS_LISTED
    slots = torch.sym_max(k_slots + 1, v_slots)
    slot_tiles = (slots + SLOTS_AT_ONCE - 1) // SLOTS_AT_ONCE
    found = step.empty(batch, capacity, dtype=torch.uint8)
    listed = Listed(
        step.empty(batch, 3, length, dtype=torch.int32),
        step.empty(batch, dtype=torch.int32),
        step.empty(batch, q_heads, queries, k_slots + 1),
        step.empty(batch, q_heads, queries, v_slots),
    )
    rows = q_heads // heads * queries
    blocks = -(-rows // EXACT_ROWS)
    k_rows, k_totals = (lengths, lengths) if k_ranks is None else k_ranks[:2]
    v_rows = lengths if v_ranks is None else v_ranks.rows
    programs = batch * (tiles + slot_tiles * (1 + heads * blocks))
    kernel(prepare_kernel)[(programs,)](
        q, k_rows, v_rows, k_totals, keys.pool_positions, values.pool_positions,
        keys.pool, values.pool, lengths, found, *listed, capacity, length, k_slots, v_slots,
        batch, tiles, slot_tiles, step.factor,
        H=heads, ROWS=rows, DK=dim, DKP=power(dim, 16), DV=v_dim,
        DVP=power(v_dim, 16), X=EXACT_ROWS, XBLOCKS=blocks,
        KPLANES=0 if k_ranks is None else k_rows.shape[1],
        VPLANES=0 if v_ranks is None else v_rows.shape[1],
        KPLANE=0 if k_ranks is None else kind * k_ranks.planes,
        VPLANE=0 if v_ranks is None else kind * v_ranks.planes,
        DROPS=int(drops), T=TOKENS_LISTED, E=SLOTS_AT_ONCE, ASM=not INTERPRETED,
        num_warps=4,
    )  # fmt: skip
    return listed
