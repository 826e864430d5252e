"""A basis for each sequence: of a prompt, and again when enough tokens have come."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codec import CodeRef, LowRankLayout
from ..codec.lowrank import factor
from .pool import reserve_sinks
from .positions import positions_of


def factor_prompt(
    x: Tensor, layout: LowRankLayout, waves: Tensor | None, visible: Tensor | None
) -> CodeRef:
    """The code of a prompt ``x [B, H, S, D]``.

    Args:
        x: keys or values as attention sees them.
        layout: of the code.
        waves: of the rotation, with a positional layout.
        visible: ``[B, S]`` bool, False for padding, which does not count; None: all visible.
    """
    first = reserve_sinks(visible, x, 1, 0)  # [B, 1]
    positions = positions_of(layout, first, 0, x.shape[2])
    return factor(x, layout, waves, positions, visible)


def refactored(ref: CodeRef, x: Tensor, pool_positions: Tensor) -> CodeRef:
    """A new basis for all tokens ``x [B, H, S, D]`` of a cache, at the rank of ``ref``.

    Args:
        ref: the code so far.
        x: tokens of the cache, coded ones decoded.
        pool_positions: ``[B, E]``: slot 0 is the first visible token of a sequence.
    """
    layout = ref.layout
    assert isinstance(layout, LowRankLayout)
    positions = positions_of(layout, pool_positions, 0, x.shape[2])
    waves = ref.code.on(x.device)[-1] if layout.positional else None
    visible = torch.arange(x.shape[2], device=x.device) >= pool_positions[:, :1]
    return factor(x, layout, waves, positions, visible)
