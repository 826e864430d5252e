"""Which tokens any query sees, read off an attention mask: ``apack::visible``."""

from __future__ import annotations

import torch
from torch import Tensor


def hiding(mask: Tensor | None, seen: Tensor) -> Tensor:
    """A mask, bool or float or None, that also hides what is not ``seen`` (bool)."""
    if mask is None:
        return seen
    if mask.dtype == torch.bool:
        return mask & seen
    return torch.where(seen, mask, float("-inf"))


def visible(mask: Tensor, batch: int, length: int) -> Tensor:
    """``[batch, length]`` bool: False where ``mask`` hides the token from every query.

    Args:
        mask: bool (True: seen) or float (added; the least value of its dtype, -1e4 and below,
            or -inf hides), broadcastable to ``[batch, Hq, Q, length]``.
        batch, length: the shape wanted.
    """
    seen = mask if mask.dtype == torch.bool else mask > -1e4
    while seen.dim() < 4:
        seen = seen[None]
    return seen.any(2).any(1).expand(batch, length)
