"""Evictions: each KV head keeps some tokens, exact, and forgets all others."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from .base import Layer, Rival, Size, between


class Eviction(Rival):
    """Of the tokens that others code, each KV head keeps ``1 / ratio``."""

    def __init__(self, ratio: float) -> None:
        self.target = ratio

    def kept(self, tokens: int) -> int:
        """How many of so many tokens stay."""
        return max(int(tokens / self.target), 1)

    @abstractmethod
    def places(self, layer: Layer) -> Tensor:
        """Which tokens stay, counted from behind the sinks, in their order: ``[B, H, kept]``."""

    def code(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens that stay, in their order."""
        places = self.places(layer)[..., None]

        def stay(x: Tensor) -> Tensor:
            return x.gather(2, places.expand(-1, -1, -1, x.shape[3]))

        return between(layer.k, stay), between(layer.v, stay)

    def coded_bytes(self, size: Size) -> float:
        """16 bits a number of the tokens that stay."""
        return 2 * 2 * self.kept(size.tokens) * size.heads * size.dim
