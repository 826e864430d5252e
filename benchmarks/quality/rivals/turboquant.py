"""TurboQuant: random rotation of each head's vector, then Lloyd-Max levels of a Gaussian.

Zandieh et al., TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate, ICLR
2026 (arXiv 2504.19874), algorithm 1: x / |x| is rotated at random, after which every coordinate
is close to a Gaussian of variance 1 / D, and each is put on the levels of the best scalar
quantiser for it; the norm is kept in 16 bits. Here without the one-bit sketch of the remainder
(algorithm 2), with a randomised Hadamard matrix as rotation.

Levels: Max, Quantizing for Minimum Distortion, IRE Transactions 1960; Lloyd 1957.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from .base import Layer, Rival, Size, between


@cache
def gaussian_levels(bits: int) -> Tensor:
    """The 2^bits levels of least squared error for a standard Gaussian, float64.

    Lloyd's iteration with exact integrals: a level is the mean of the Gaussian between its
    bounds, bounds are midway between levels.
    """
    normal = torch.distributions.Normal(
        torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    )
    count = 2**bits
    levels = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    infinity = levels.new_tensor([math.inf])
    for _ in range(2000):
        middles = (levels[1:] + levels[:-1]) / 2
        bounds = torch.cat([-infinity, middles, infinity])  # [count + 1]
        density = normal.log_prob(bounds).exp()
        mass = normal.cdf(bounds)
        levels = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    return levels


def hadamard(size: int) -> Tensor:
    """The orthonormal Hadamard matrix, by Sylvester's construction: float64 ``[size, size]``.

    Raises:
        ValueError: size is not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"size={size}: accepted is a power of two")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def rotation(size: int, seed: int) -> Tensor:
    """A Hadamard matrix with random signs of its rows: orthonormal, float64 ``[size, size]``."""
    signs = torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return signs * hadamard(size)


def rotate_and_quantise(x: Tensor, bits: int, seed: int) -> Tensor:
    """``x [..., D]``, coded vector by vector."""
    turn = rotation(x.shape[-1], seed).to(x)
    levels = gaussian_levels(bits).to(x)
    rotated = x @ turn
    scale = rotated.square().mean(-1, keepdim=True).sqrt()
    bounds = (levels[1:] + levels[:-1]) / 2
    nearest = levels[torch.bucketize(rotated / scale.clamp(min=1e-12), bounds)]
    return (nearest * scale) @ turn.T


class TurboQuant(Rival):
    """TurboQuant with ``bits`` for keys and values."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def code(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Keys and values alike, with a rotation of their own."""
        return (
            between(layer.k, lambda k: rotate_and_quantise(k, self.bits, 0)),
            between(layer.v, lambda v: rotate_and_quantise(v, self.bits, 1)),
        )

    def coded_bytes(self, size: Size) -> float:
        """Levels, and 16 bits for the norm of each head's vector."""
        return size.numbers * self.bits / 8 + size.numbers / size.dim * 2
