"""Append new tokens to the ring, in place: ``apack::append_``."""

from __future__ import annotations

import torch
from torch import Tensor


def append_(ring: Tensor, new: Tensor, lengths: Tensor) -> None:
    """Write ``new [B, H, T, D]`` behind the live slots of ``ring [B, H, ring, D]``.

    Args:
        ring: changed in place.
        new: T new tokens; there must be room for them.
        lengths: int64 ``[2]``: tokens coded, tokens in the ring after this append.
    """
    slots = lengths[1] - new.shape[2] + torch.arange(new.shape[2], device=ring.device)
    ring.index_copy_(2, slots, new.to(ring.dtype))
