"""Levels of the tokens of a prompt: how much each is worth, by kind where kinds have own codes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codec import Layout
from .pool import pooled_tokens, reserve_sinks


def prompt_levels(
    x: Tensor, visible: Tensor | None, seen: Tensor, importance: Tensor | None, code: Layout,
    sinks: int, kinds: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Levels ``[B, S]`` uint8 of tokens ``x [B, H, S, D]``; None: the code has no planes.

    Args:
        x: keys or values.
        visible: ``[B, S]`` bool, False for padding; None: all are seen.
        seen: ``[B, S]`` or ``[S]`` bool: tokens that are coded and no padding. Others are of the
            lowest level of their kind.
        importance: ``[B, S]``; None: the largest tokens come first.
        code: the layout.
        sinks: first visible tokens, which are in the pool.
        kinds: ``[B, S]``, where planes are of kinds.
    """
    if not code.weighs:
        return kinds  # codes of kinds without levels of their own
    weight = torch.where(seen, token_sizes(x) if importance is None else importance, -1.0)
    if code.evicts and sinks:  # they are in the pool, and want no row
        reserved = reserve_sinks(visible, x, sinks, 0)  # [B, sinks]
        weight = torch.where(pooled_tokens(reserved, 0, x.shape[2]), -1.0, weight)
    if kinds is None:
        return torch.ops.apack.token_levels(weight, code.shares)
    levels = torch.zeros_like(kinds)
    for kind, (inner, first) in enumerate(zip(code.by_kind, code.first_levels, strict=True)):
        mine = kinds == kind
        level = torch.zeros_like(kinds)
        if inner.shares:
            own = torch.where(mine, weight, -1.0)
            level = torch.ops.apack.token_levels(own, inner.shares)
        levels = torch.where(mine, level + first, levels)
    return levels


def token_sizes(x: Tensor) -> Tensor:
    """Squared sizes ``[B, T]`` of tokens ``x [B, H, T, D]``; numbers that are not finite are 0."""
    return torch.where(x.isfinite(), x, 0.0).float().square().sum((1, 3))
