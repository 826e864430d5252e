from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.quality.rivals.base import RECENT, SINKS, Layer

MIDDLE = slice(SINKS, -RECENT)


def layer(
    tokens: int, heads: int = 2, dim: int = 16, batch: int = 2, dtype: torch.dtype = torch.float64
) -> Layer:
    """Random keys, values and received attention, queries of two query heads a KV head; tables of a
    real rotation.
    """
    generator = torch.Generator().manual_seed(tokens)
    k, v, q = (
        torch.randn(batch, h, s, dim, generator=generator, dtype=dtype)
        for h, s in ((heads, tokens), (heads, tokens), (2 * heads, RECENT))
    )
    speed = 10_000.0 ** (-torch.arange(dim // 2, dtype=dtype) * 2 / dim)
    angle = torch.arange(tokens, dtype=dtype)[:, None] * torch.cat([speed, speed])
    got = torch.rand(batch, heads, tokens, generator=generator, dtype=dtype)
    return Layer(k, v, angle.cos(), angle.sin(), q, got)


def assert_exact_outside(coded: Tensor, x: Tensor) -> None:
    """Sinks and recent tokens are as they were."""
    assert torch.equal(coded[:, :, :SINKS], x[:, :, :SINKS])
    assert torch.equal(coded[:, :, -RECENT:], x[:, :, -RECENT:])
