"""Attention that tokens receive: what evictions and the paper's tiers go by."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 256
"""Queries whose weights are held at once."""


def votes(queries: Tensor, k: Tensor) -> Tensor:
    """Attention that the last tokens pay to each one, summed over heads by KV head: ``[B, H, S]``.

    Args:
        queries: of the last W tokens, ``[B, Hq, W, D]``.
        k: keys of all tokens, ``[B, H, S, D]``.
    """
    _, heads, length, dim = k.shape
    window = queries.shape[2]
    grouped = queries.unflatten(1, (heads, -1))  # [B, H, Hq / H, W, D]
    scores = grouped @ k[:, :, None].transpose(-1, -2) / dim**0.5  # [B, H, Hq / H, W, S]
    here = torch.arange(length, device=k.device)
    future = here > here[-window:, None]
    return scores.masked_fill(future, float("-inf")).softmax(-1).sum((2, 3))


def received(queries: Tensor, k: Tensor) -> Tensor:
    """The same that all tokens pay to each one: ``[B, H, S]``, float32 at least.

    Args:
        queries: of all tokens, ``[B, Hq, S, D]``.
        k: keys of all tokens, ``[B, H, S, D]``.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    k = k.to(dtype)
    total = k.new_zeros(k.shape[:3])
    for start in range(0, k.shape[2], CHUNK):
        some = queries[:, :, start : start + CHUNK].to(dtype)
        end = start + some.shape[2]
        total[:, :, :end] += votes(some, k[:, :, :end])
    return total
