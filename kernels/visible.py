"""Which tokens any query sees, read off an attention mask: ``apack::visible``."""

from __future__ import annotations

import torch
from torch import Tensor


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
