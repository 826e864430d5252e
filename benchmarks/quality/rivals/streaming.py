"""StreamingLLM: keep attention sinks and the most recent tokens, forget all others.

Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024 (arXiv
2309.17453). Here tokens keep the positions that they had, so that nothing but the missing tokens
is compared.
"""

from __future__ import annotations

from torch import Tensor

from .base import Layer, Rival, Size, between


class Streaming(Rival):
    """Of the tokens that others code, the last ``1 / ratio`` stay, exact."""

    def __init__(self, ratio: float) -> None:
        self.target = ratio

    def kept(self, tokens: int) -> int:
        """How many of so many tokens stay."""
        return max(int(tokens / self.target), 1)

    def code(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens that stay."""

        def latest(x: Tensor) -> Tensor:
            return x[:, :, -self.kept(x.shape[2]) :]

        return between(layer.k, latest), between(layer.v, latest)

    def coded_bytes(self, size: Size) -> float:
        """16 bits a number of the tokens that stay."""
        return 2 * 2 * self.kept(size.tokens) * size.heads * size.dim
