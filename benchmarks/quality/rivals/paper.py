"""AttentionPack, the paper, in any of the settings that it reports.

AttentionPack, CVPR 2026 (arXiv 2603.23914): keys, before their rotation, and values of a layer are
factored for each sequence (section 3.1; see :mod:`factors`). Tokens fall into two groups by the
attention that they received, averaged over heads and over the queries of the prompt (3.2); the
paper's own setting is a quarter of the tokens with all components, the others with a quarter of
them, of values alone. Its eviction drops the second group.

Here the SVD is exact, not randomised; attention is that of the prompt, where the paper goes on
averaging while it decodes; and components that are not read are not counted as stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Layer, Rival, Size, between, between_exact
from .factors import Factors
from .truncated_svd import rotate


@dataclass(frozen=True)
class Paper(Rival):
    """One setting.

    Attributes:
        k, v: how keys and values are factored; None: they stay as they are, 16-bit numbers.
        share: of the tokens, that have all components.
        evict: the others are dropped.
    """

    k: Factors | None
    v: Factors | None
    share: float = 1.0
    evict: bool = False

    def full(self, tokens: int) -> int:
        """How many of so many tokens have all components."""
        return round(self.share * tokens)

    def code(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Keys without their rotation, values as they are; without dropped tokens."""
        cos, sin = (between_exact(table, 0) for table in (layer.cos, layer.sin))
        attention = between_exact(layer.received, 2).sum(1)  # [B, S]
        order = attention.argsort(-1, descending=True)
        full = self.full(order.shape[1])

        def coded(x: Tensor, factors: Factors | None) -> Tensor:
            return x if factors is None else factors.through(x, order, full)

        def stay(x: Tensor) -> Tensor:
            if not self.evict:
                return x
            places = order[:, :full].sort(-1).values[:, None, :, None]
            return x.gather(2, places.expand(-1, x.shape[1], -1, x.shape[3]))

        def keys(k: Tensor) -> Tensor:
            return stay(rotate(coded(rotate(k, cos, -sin), self.k), cos, sin))

        return between(layer.k, keys), between(layer.v, lambda v: stay(coded(v, self.v)))

    def coded_bytes(self, size: Size) -> float:
        """Coefficients and bases of keys and of values; 16 bits a number without factors."""
        full = self.full(size.tokens)
        tokens = full if self.evict else size.tokens
        return sum(
            tokens * size.heads * size.dim * 2
            if factors is None
            else factors.stored(tokens, full, size.heads, size.dim)
            for factors in (self.k, self.v)
        )
