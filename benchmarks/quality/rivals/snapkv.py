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

from .base import Layer, Rival, Size, between, between_exact

POOL = 7
"""Tokens over which scores are pooled."""


def votes(queries: Tensor, k: Tensor) -> Tensor:
    """Attention that the last tokens pay to each token: ``[B, H, S]``.

    Args:
        queries: of the last W tokens, ``[B, Hq, W, D]``.
        k: keys of all tokens, ``[B, H, S, D]``.
    """
    _, heads, length, dim = k.shape
    window = queries.shape[2]
    grouped = queries.unflatten(1, (heads, -1))  # [B, H, Hq / H, W, D]
    scores = grouped @ k[:, :, None].transpose(-1, -2) / dim**0.5  # [B, H, Hq / H, W, S]
    here = torch.arange(length, device=k.device)
    future = here > here[-window:, None]
    return scores.masked_fill(future, float("-inf")).softmax(-1).sum((2, 3))


class SnapKv(Rival):
    """Of the tokens that others code, each KV head keeps the best ``1 / ratio``, exact."""

    def __init__(self, ratio: float) -> None:
        self.target = ratio

    def kept(self, tokens: int) -> int:
        """How many of so many tokens stay."""
        return max(int(tokens / self.target), 1)

    def code(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens that stay, in their order."""
        importance = between_exact(votes(layer.queries, layer.k), 2)
        pooled = torch.nn.functional.avg_pool1d(importance, POOL, 1, POOL // 2)
        chosen = pooled.topk(self.kept(pooled.shape[2]), -1).indices.sort(-1).values  # [B, H, kept]

        def best(x: Tensor) -> Tensor:
            return x.gather(2, chosen[..., None].expand(-1, -1, -1, x.shape[3]))

        return between(layer.k, best), between(layer.v, best)

    def coded_bytes(self, size: Size) -> float:
        """16 bits a number of the tokens that stay."""
        return 2 * 2 * self.kept(size.tokens) * size.heads * size.dim
