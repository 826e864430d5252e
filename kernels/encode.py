"""Encode a whole prefill: codes, pool and ring of one side, in plain PyTorch.

This is the meaning of ``apack::encode`` and its CPU path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..codec import Layout, parse_layout
from .positions import positions_of


def encode(
    x: Tensor,
    visible: Tensor | None,
    params: Sequence[Tensor],
    layout: str,
    sinks: int,
    extra: int,
    window: int,
    ring: int,
    chunk: int,
) -> list[Tensor]:
    """Code tokens ``x [B, H, S, D]``; the last ``window`` of them are also the ring.

    Args:
        x: keys or values as attention sees them.
        visible: ``[B, S]`` bool, False where no query sees the token (padding); None: all seen.
        params: the fitted parameters of ``layout``.
        layout: spec of the code.
        sinks, extra: pool slots reserved for the first visible tokens, and on demand.
        window: recent tokens that stay exact.
        ring: slots of the ring, at least ``window``.
        chunk: payload capacity is a multiple of this.

    Returns:
        Payload tensors ``[B, C, width]``, pool ``[B, H, E, D]``, its positions ``[B, E]``, ring
        ``[B, H, ring, D]``. Tokens ``0 .. max(S - window, 0)`` count as coded; those in the ring
        are coded too, and coded again when they leave it.
    """
    length = x.shape[2]
    pool, positions = torch.ops.apack.make_pool(x, visible, sinks, extra)
    capacity = (length + chunk - 1) // chunk * chunk
    payload = [
        torch.nn.functional.pad(part, (0, 0, 0, capacity - length)).contiguous()
        for part in encode_tokens(x, params, parse_layout(layout), positions, 0)
    ]
    coded = torch.sym_max(length - window, 0)
    slots = coded + torch.arange(ring, device=x.device)
    recent = x.index_select(2, slots.clamp(max=length - 1))  # slots past the end: stale
    return [*payload, pool, positions, recent]


def encode_tokens(
    x: Tensor, params: Sequence[Tensor], layout: Layout, pool_positions: Tensor, start: int
) -> list[Tensor]:
    """Payload of tokens ``x [B, H, T, D]``; numbers that are not finite are coded as 0.

    Args:
        x: tokens ``start .. start + T``.
        params: of the code.
        layout: of the code.
        pool_positions: of the cache, ``[B, E]``: says where each sequence begins.
        start: of the first token.
    """
    if layout.kind != "exact":
        x = torch.where(x.isfinite(), x, 0.0)
    return layout.encode(x, params, positions_of(layout, pool_positions, start, x.shape[2]))
