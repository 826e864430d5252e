"""What a rival is: a function of one layer's dense cache after prefill, and its bytes.

All of them leave the first tokens (attention sinks) and the most recent ones exact, so that only
the codes are compared. A rival codes the context once; what is decoded afterwards stays dense.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

SINKS = 4
"""First tokens, exact for every method."""

RECENT = 64
"""Last tokens of the context, exact for every method."""


@dataclass(frozen=True)
class Layer:
    """One layer's cache after prefill.

    Attributes:
        k, v: keys, as attention sees them, and values: ``[B, H, S, D]``.
        cos, sin: of the rotation of each token's key: ``[S, D]``.
        queries: of the last tokens, rotated: ``[B, Hq, W, D]``.
        received: attention that all tokens pay to each one, summed over the query heads of a KV
            head: ``[B, H, S]``.
    """

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    queries: Tensor
    received: Tensor

    def to(self, device: torch.device) -> Layer:
        """The same on another device."""
        return Layer(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Size:
    """What bytes depend on: tokens that are coded, KV heads, head dimension."""

    tokens: int
    heads: int
    dim: int

    @property
    def numbers(self) -> int:
        """Numbers of keys and values together."""
        return 2 * self.tokens * self.heads * self.dim


class Rival(ABC):
    """A code of the cache."""

    @abstractmethod
    def code(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Keys and values as attention would read them back: ``[B, H, S', D]``."""

    @abstractmethod
    def coded_bytes(self, size: Size) -> float:
        """Bytes of one sequence's coded tokens in one layer, everything they need counted."""

    def ratio(self, size: Size) -> float:
        """16-bit dense bytes of the coded tokens over their coded bytes."""
        return 2 * size.numbers / self.coded_bytes(size)

    def whole_ratio(self, context: int, heads: int, dim: int) -> float:
        """The same of the whole cache: exact tokens, 16-bit, counted as well."""
        size = Size(context - SINKS - RECENT, heads, dim)
        exact = 2 * Size(SINKS + RECENT, heads, dim).numbers
        dense = 2 * Size(context, heads, dim).numbers
        return dense / (exact + self.coded_bytes(size))


def between_exact(x: Tensor, dim: int) -> Tensor:
    """What of ``x`` lies between sinks and recent tokens, which are along ``dim``.

    Raises:
        ValueError: there are no tokens between.
    """
    length = x.shape[dim]
    if length <= SINKS + RECENT:
        raise ValueError(f"{length} tokens: accepted is more than {SINKS + RECENT}")
    return x.narrow(dim, SINKS, length - SINKS - RECENT)


def between(x: Tensor, code: Callable[[Tensor], Tensor]) -> Tensor:
    """``x [B, H, S, D]`` with the tokens between sinks and recent ones replaced by ``code``'s."""
    coded = code(between_exact(x, 2))
    return torch.cat([x[:, :, :SINKS], coded, x[:, :, -RECENT:]], 2)
