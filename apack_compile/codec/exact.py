"""The identity code: tokens kept as they are, through all of the machinery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .layout import Layout, scores_of_keys


@dataclass(frozen=True)
class ExactLayout(Layout):
    """Payload: one tensor ``[B, T, H * D]`` in the cache's own dtype."""

    kind: ClassVar[str] = "exact"

    @property
    def param_count(self) -> int:
        """Nothing is fitted."""
        return 0

    def payload_fields(self, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], ...]:
        """One field as wide as the token, in the cache's dtype."""
        return ((self.heads * self.dim, dtype),)

    def _heads(self, payload: Sequence[Tensor]) -> Tensor:
        return payload[0].unflatten(-1, (self.heads, self.dim)).transpose(1, 2)  # [B, H, T, D]

    def encode(
        self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Heads side by side, token by token."""
        return [x.transpose(1, 2).flatten(2)]  # [B, T, H * D]

    def decode(
        self, payload: Sequence[Tensor], params: Sequence[Tensor], dtype: torch.dtype,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The tokens as they were."""
        return self._heads(payload).to(dtype)

    def scores(
        self, q: Tensor, payload: Sequence[Tensor], params: Sequence[Tensor],
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Plain ``q k^T``."""
        return scores_of_keys(q, self._heads(payload).to(q.dtype))

    def mix(self, p: Tensor, payload: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """Plain ``p v``."""
        v = self._heads(payload).to(p.dtype)
        grouped = p.unflatten(1, (self.heads, -1)).flatten(2, 3)  # [B, H, Hq/H * Q, T]
        return (grouped @ v).unflatten(2, (-1, p.shape[2])).flatten(1, 2)
