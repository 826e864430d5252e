"""SnapKV: keep the tokens that the last queries of the prompt attend to, forget all others.

Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, NeurIPS 2024 (arXiv
2404.14469): attention of an observation window at the end of the prompt to every earlier token,
summed over the window, smoothed along tokens by pooling, and the best tokens of each head kept.
With grouped queries, the sum runs over the query heads that share a KV head. The queries come
from the prompt alone: a question that is asked later is not seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import votes
from .base import Layer, between_exact
from .eviction import Eviction

POOL = 7
"""Tokens over which scores are pooled."""


class SnapKv(Eviction):
    """The tokens that the last ones attend to, and their neighbours."""

    def places(self, layer: Layer) -> Tensor:
        """The best by the pooled votes of the observation window."""
        importance = between_exact(votes(layer.queries, layer.k), 2)
        pooled = torch.nn.functional.avg_pool1d(importance, POOL, 1, POOL // 2)
        return pooled.topk(self.kept(pooled.shape[2]), -1).indices.sort(-1).values
