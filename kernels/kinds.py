"""Which tokens of a prompt have rows in the planes of which kind, sorted once for all layers.

How many tokens are visual is known only when a prompt is there. Rows are found outside of the
compiled graph, which takes them as tensors: their lengths are symbols in it, so that it is compiled
once for prompts of all mixtures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codec.kinds import KINDS
from .planes import capacity_for


@dataclass(frozen=True)
class SortedTokens:
    """The tokens of a prompt by kind.

    Attributes:
        kinds: of each token, ``[B, S]`` uint8.
        rows: of each kind, the tokens that fill its planes: ``[B, R]`` int64, R a multiple of the
            chunk; those of the kind first, then whatever fills up.
        counts: of each kind, the coded tokens of the sequence that has the most.
        has_visual: whether any token is visual, coded or not.
    """

    kinds: Tensor
    rows: tuple[Tensor, ...]
    counts: tuple[int, ...]
    has_visual: bool

    def tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """What ``apack::encode`` takes, on ``device``."""
        return tuple(t.to(device) for t in (self.kinds, *self.rows))


def sort_tokens(visual: Tensor, coded: int, chunk: int) -> SortedTokens:
    """Sort the tokens of a prompt. Waits for the device once.

    Args:
        visual: ``[B, S]`` bool.
        coded: the first tokens, which are coded.
        chunk: capacities are multiples of this.
    """
    # New tensors, here and below: graphs are compiled for their strides.
    kinds = torch.zeros(visual.shape, dtype=torch.uint8, device=visual.device)
    kinds.copy_(visual)
    mine = [kinds[:, :coded] == kind for kind in range(KINDS)]  # [B, coded] each
    most = [m.sum(1).max() for m in mine]
    *counts, seen = torch.stack([*most, visual.any().long()]).tolist()
    rows = tuple(_rows(m, capacity_for(n, chunk)) for m, n in zip(mine, counts, strict=True))
    return SortedTokens(kinds, rows, tuple(counts), bool(seen))


def _rows(mine: Tensor, count: int) -> Tensor:
    order = (~mine).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    rows = order.new_zeros(len(order), count)
    rows[:, : order.shape[1]] = order
    return rows


def all_text(x: Tensor, coded: int, chunk: int) -> tuple[Tensor, ...]:
    """``SortedTokens.tensors`` of tokens ``x [B, H, S, D]`` that nothing is known of."""
    batch, _, length, _ = x.shape
    kinds = torch.zeros(batch, length, dtype=torch.uint8, device=x.device)
    text = torch.arange(capacity_for(coded, chunk), device=x.device).clamp(max=length - 1)
    visual = torch.zeros(chunk, dtype=torch.int64, device=x.device)
    return kinds, text.expand(batch, -1), visual.expand(batch, -1)
