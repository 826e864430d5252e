"""Positions of cached tokens, for codes that depend on them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codec import Layout


def positions_of(
    layout: Layout, pool_positions: Tensor, start: int | Tensor, count: int
) -> Tensor | None:
    """Positions ``[B, count]`` of tokens ``start ..``, counted from each sequence's first.

    Args:
        layout: the code; None is returned if it does not ask for positions.
        pool_positions: ``[B, E]``; slot 0 is reserved for the first visible token of a sequence
            (caches with positional codes have sinks).
        start, count: tokens wanted.
    """
    if not layout.positional:
        return None
    return start + torch.arange(count, device=pool_positions.device) - pool_positions[:, :1]
