"""Packed side back to a dense cache tensor, in plain PyTorch: ``apack::unpack``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..codec import parse_layout
from .planes import spread
from .pool import override
from .positions import positions_of
from .side import Side


def unpack(side: Sequence[Tensor], lengths: Tensor, length: int, layout: str) -> Tensor:
    """The tokens ``0 .. length`` as ``[B, H, length, D]``.

    Args:
        side: one packed side, flat (:class:`Side`).
        lengths: int64 ``[2]``: tokens coded, tokens in the ring.
        length: logical tokens wanted, at most the sum of ``lengths``.
        layout: spec of the code.
    """
    code = parse_layout(layout)
    tensors = Side.of(side, code)
    dtype = tensors.ring.dtype
    positions = positions_of(code, tensors.pool_positions, 0, tensors.capacity)
    payload = spread(tensors.payload, code)
    decoded = code.decode(payload, tensors.params, dtype, positions)  # [B, H, C, D]
    if tensors.pool.shape[2]:
        decoded = override(decoded, tensors.pool_positions, tensors.pool, 2)
    everything = torch.cat([decoded, tensors.ring], 2)
    here = torch.arange(length, device=tensors.ring.device)
    coded = lengths[0]
    return everything.index_select(
        2, torch.where(here < coded, here, here - coded + tensors.capacity)
    )
