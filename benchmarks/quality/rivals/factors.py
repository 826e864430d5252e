"""Keys or values of a sequence as coefficients times a basis: truncated SVD, in several settings.

What the paper varies (AttentionPack, arXiv 2603.23914): the rank, all heads together or each by
itself (section 3.1), fewer components for tokens that receive little attention (3.2), and numbers
of fewer bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kivi import GROUP, by_channel, by_token


@dataclass(frozen=True)
class Factors:
    """How one side of the cache is factored.

    Attributes:
        rank: components of a token; of each head, with ``by_head``.
        rest: components of a token that receives little attention; 0: such tokens are as others.
        by_head: each head has a basis of its own.
        bits: of coefficients and basis: 16, or fewer by KIVI's quantiser, coefficients by component
            in groups of 64 tokens, the basis by component in groups of up to 64 channels.
    """

    rank: int
    rest: int = 0
    by_head: bool = False
    bits: int = 16

    def through(self, x: Tensor, order: Tensor, full: int) -> Tensor:
        """``x [B, H, S, D]``, factored and rebuilt.

        Args:
            x: keys, not rotated, or values.
            order: tokens by attention, most first: ``[B, S]``.
            full: how many of them have all components.
        """
        joint = x if self.by_head else x.transpose(1, 2).flatten(2)[:, None]  # [B, 1, S, H D]
        coefficients, basis = factor(joint, self.rank)
        basis = self._rounded_basis(basis)  # [B, 1 or H, R, channels]
        places = order[:, None, :, None].expand(-1, coefficients.shape[1], -1, self.rank)
        sorted_ = coefficients.gather(2, places)
        groups = [sorted_[:, :, :full], sorted_[:, :, full:, : self.rest or self.rank]]
        rebuilt = torch.cat(
            [self._rounded(group) @ basis[:, :, : group.shape[3]] for group in groups], 2
        ).to(x.dtype)
        places = order[:, None, :, None].expand_as(rebuilt)
        back = torch.empty_like(rebuilt).scatter_(2, places, rebuilt)
        return back if self.by_head else back[:, 0].unflatten(2, (x.shape[1], -1)).transpose(1, 2)

    def stored(self, tokens: int, full: int, heads: int, dim: int) -> float:
        """Bytes of the coefficients of so many tokens, ``full`` of them whole, and of the basis.

        The components that a token has not are not counted, though the paper stores them.
        """
        bases, channels = (heads, dim) if self.by_head else (1, heads * dim)
        few = self._bytes(tokens - full, self.rest or self.rank)
        coefficients = self._bytes(full, self.rank) + few
        scales = 0 if self.bits == 16 else 4 * channels / min(GROUP, channels)
        return bases * (coefficients + self.rank * (channels * self.bits / 8 + scales))

    def _bytes(self, tokens: int, rank: int) -> float:
        """Of coefficients, tokens behind the last whole group with 16 bits."""
        if self.bits == 16:
            return 2 * tokens * rank
        groups, behind = divmod(tokens, GROUP)
        return rank * (groups * (GROUP * self.bits / 8 + 4) + 2 * behind)

    def _rounded(self, coefficients: Tensor) -> Tensor:
        if self.bits == 16:
            return coefficients.half().to(coefficients.dtype)
        return by_channel(coefficients, self.bits)

    def _rounded_basis(self, basis: Tensor) -> Tensor:
        if self.bits == 16:
            return basis.half().to(basis.dtype)
        return by_token(basis, self.bits)


def factor(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Coefficients ``[..., S, R]``, scaled by the singular values, and a basis ``[..., R, N]``.

    They are those of the exact SVD of ``x [..., S, N]``. Its right singular vectors are the
    eigenvectors of ``x^T x``, found in float64 on the host: CUDA takes far longer for that.
    """
    wide = x.double()
    _, vectors = torch.linalg.eigh((wide.mT @ wide).cpu())  # by size, least first
    basis = vectors.flip(-1)[..., :rank].to(x.device)  # [..., N, R]
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (wide @ basis).to(dtype), basis.mT.to(dtype)
