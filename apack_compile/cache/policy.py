"""Which tokens of a packed side stay exact, and how its storage grows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..codec import CodeRef, ExactLayout


@dataclass(frozen=True)
class Policy:
    """Which tokens stay exact, and how storage grows.

    Attributes:
        sinks: first visible tokens of each row, kept exact for good.
        extra: further exact slots, for tokens that the code holds badly or not at all.
        window: recent tokens that are never coded.
        block: tokens that gather behind the window before they are coded together.
        chunk: the payload grows by this many tokens.
    """

    sinks: int = 4
    extra: int = 8
    window: int = 64
    block: int = 32
    chunk: int = 64

    @property
    def ring(self) -> int:
        """Slots of the ring."""
        return self.window + self.block

    def for_code(self, ref: CodeRef) -> Policy:
        """The same policy without a pool where the code is exact anyway."""
        exact = ref.layout.kind == ExactLayout.kind
        return replace(self, sinks=0, extra=0) if exact else self

    @property
    def fixed(self) -> Policy:
        """The same for a cache that does not grow: no token of it is recent."""
        return replace(self, window=0)


def encode_arguments(
    ref: CodeRef, policy: Policy, device: torch.device
) -> tuple[tuple[Tensor, ...], str, int, int, int, int, int]:
    """The arguments of ``apack::encode`` behind ``x`` and ``visible``."""
    p = policy
    return (ref.code.on(device), ref.layout.spec, p.sinks, p.extra, p.window, p.ring, p.chunk)
