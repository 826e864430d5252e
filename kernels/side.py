"""The physical tensors of one packed side, in the order in which ops take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..codec import Layout


class Side(NamedTuple):
    """One side (K or V) of one layer.

    The token at position s is read from the ring, at slot s - coded, if s >= coded; else from the
    pool, if one of its positions is s; else from the codes.

    Attributes:
        payload: codes of the tokens ``0 .. coded``, capacity C: each ``[B, C, width]``; planes
            have rows for some of them only (``planes.py``).
        pool: tokens kept exact: ``[B, H, E, D]``.
        pool_positions: their positions, -1 for a free slot: ``[B, E]`` int64.
        ring: the most recent tokens, exact: ``[B, H, ring, D]``.
        params: the fitted parameters of the code.
    """

    payload: tuple[Tensor, ...]
    pool: Tensor
    pool_positions: Tensor
    ring: Tensor
    params: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], layout: Layout) -> Side:
        """Split the flat list that an op gets."""
        n = len(layout.payload_fields(tensors[0].dtype))
        pool, positions, ring, *params = tensors[n:]
        return cls(tuple(tensors[:n]), pool, positions, ring, tuple(params))

    def to(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> Side:
        """A copy of a cache in another dtype or on another device; codes keep their dtype."""

        def move(t: Tensor, kind: torch.dtype) -> Tensor:
            return t.to(device=device, dtype=kind, copy=True)

        kinds = [kind for _, kind in layout.payload_fields(dtype)]
        return Side(
            tuple(move(t, kind) for t, kind in zip(self.payload, kinds, strict=True)),
            move(self.pool, dtype),
            move(self.pool_positions, self.pool_positions.dtype),
            move(self.ring, dtype),
            (),
        )

    @property
    def capacity(self) -> int:
        """Tokens that the payload has room for."""
        return self.payload[0].shape[1]
