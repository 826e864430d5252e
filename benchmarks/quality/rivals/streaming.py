"""StreamingLLM: keep attention sinks and the most recent tokens, forget all others.

Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024 (arXiv
2309.17453). Here tokens keep the positions that they had, so that nothing but the missing tokens
is compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Layer, between_exact
from .eviction import Eviction


class Streaming(Eviction):
    """The most recent tokens."""

    def places(self, layer: Layer) -> Tensor:
        """The last ones."""
        batch, heads, length = between_exact(layer.k, 2).shape[:3]
        last = torch.arange(length - self.kept(length), length, device=layer.k.device)
        return last.expand(batch, heads, -1)
