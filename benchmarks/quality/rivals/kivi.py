"""KIVI: asymmetric uniform quantisation, keys by channel, values by token.

Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, ICML 2024
(arXiv 2402.02750), section 3: a number becomes round((x - z) / s), z the least number of its
group, s = (largest - least) / (2^b - 1). Keys are grouped along the tokens of a channel, values
along the channels of a token. Scale and zero point of a group take 16 bits each.
"""

from __future__ import annotations

from torch import Tensor

from .base import Layer, Rival, Size, between

GROUP = 64
"""Tokens of a channel, or channels of a token, that share a scale."""


def quantise(x: Tensor, bits: int, dim: int) -> Tensor:
    """``x`` on the 2^bits levels between the extremes along ``dim``."""
    low = x.amin(dim, keepdim=True)
    step = (x.amax(dim, keepdim=True) - low) / (2**bits - 1)
    level = ((x - low) / step.clamp(min=1e-12)).round()
    return low + level * step


def by_channel(k: Tensor, bits: int) -> Tensor:
    """Keys ``[B, H, S, D]``, grouped along tokens; tokens behind the last whole group are exact."""
    whole = k.shape[2] // GROUP * GROUP
    coded = k.clone()
    groups = k[:, :, :whole].unflatten(2, (-1, GROUP))  # [B, H, S / GROUP, GROUP, D]
    coded[:, :, :whole] = quantise(groups, bits, 3).flatten(2, 3)
    return coded


def by_token(v: Tensor, bits: int) -> Tensor:
    """Values ``[B, H, S, D]``, grouped along the channels of a head."""
    width = min(GROUP, v.shape[3])
    return quantise(v.unflatten(3, (-1, width)), bits, 4).flatten(3, 4)


class Kivi(Rival):
    """KIVI with ``bits`` for keys and values."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def code(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Keys by channel, values by token."""
        return (
            between(layer.k, lambda k: by_channel(k, self.bits)),
            between(layer.v, lambda v: by_token(v, self.bits)),
        )

    def coded_bytes(self, size: Size) -> float:
        """Levels, 32 bits a group, and 16-bit keys behind the last whole group."""
        channels = size.heads * size.dim
        whole = size.tokens // GROUP * GROUP
        rest = size.tokens - whole
        keys = (
            whole * channels * self.bits / 8 + whole // GROUP * channels * 4 + rest * channels * 2
        )
        per_token = channels * self.bits / 8 + channels / min(GROUP, size.dim) * 4
        return keys + size.tokens * per_token
