"""H2O: keep the tokens that received most attention over the whole prompt, and recent ones.

Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models,
NeurIPS 2023 (arXiv 2306.14048): half of what is kept are the most recent tokens, the other half
those with the largest sums of attention weights, over all queries so far. With grouped queries, the
sum runs over the query heads that share a KV head. Here tokens are dropped once, behind the prompt;
H2O's own decoding goes on dropping.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Layer, between_exact
from .eviction import Eviction


class H2O(Eviction):
    """Heavy hitters and recent tokens, half of each; the odd one is a heavy hitter."""

    def places(self, layer: Layer) -> Tensor:
        """The heavy hitters among the older tokens, then the recent ones."""
        received = between_exact(layer.received, 2)  # [B, H, S]
        batch, heads, length = received.shape
        kept = self.kept(length)
        old = length - kept // 2
        heavy = received[..., :old].topk(kept - kept // 2, -1).indices.sort(-1).values
        recent = torch.arange(old, length, device=heavy.device).expand(batch, heads, -1)
        return torch.cat([heavy, recent], -1)
