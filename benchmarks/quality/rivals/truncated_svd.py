"""AttentionPack, the paper: truncated SVD of all heads' keys, not rotated, and of their values.

AttentionPack, CVPR 2026 (arXiv 2603.23914), section 3.1: K and V of a layer, heads side by side,
``[S, H D]``, become coefficients ``[S, R]`` (scaled by the singular values) times ``[R, H D]``,
for each sequence; all 16-bit. Keys are factored before the rotary embedding and rotated when they
are rebuilt. Here one rank serves keys and values, and the SVD is exact, not randomised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Layer, Rival, Size, between, between_exact


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding by halves of ``x [B, H, S, D]``; its inverse with ``-sin``.

    Su et al., RoFormer (arXiv 2104.09864), in the order of channels that Llama uses.
    """
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def truncate(x: Tensor, rank: int) -> Tensor:
    """``x [B, H, S, D]`` through 16-bit factors of rank ``rank``, all heads together."""
    joint = x.transpose(1, 2).flatten(2)  # [B, S, H D]
    # By QR first, the rest on the host: CUDA takes far longer for the SVD of a tall matrix.
    q, r = torch.linalg.qr(joint.float())
    u, s, vh = (part.to(x.device) for part in torch.linalg.svd(r.cpu(), full_matrices=False))
    coefficients = (q @ (u[..., :rank] * s[:, None, :rank])).half().float()  # [B, S, R]
    basis = vh[:, :rank].half().float()  # [B, R, H D]
    rebuilt = (coefficients @ basis).to(x.dtype)
    return rebuilt.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)


class TruncatedSvd(Rival):
    """The paper's code with the rank that makes coefficients take ``1 / ratio`` of dense bytes.

    The basis belongs to the sequence, and is counted: the ratio that is reached is below the one
    that is named, the more the shorter the context.
    """

    def __init__(self, ratio: float) -> None:
        self.target = ratio

    def rank(self, channels: int) -> int:
        """Singular values that are kept."""
        return max(int(channels / self.target), 1)

    def code(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Keys without their rotation, values as they are."""
        rank = self.rank(layer.k.shape[1] * layer.k.shape[3])
        cos, sin = (between_exact(table, 0) for table in (layer.cos, layer.sin))

        def keys(k: Tensor) -> Tensor:
            return rotate(truncate(rotate(k, cos, -sin), rank), cos, sin)

        return between(layer.k, keys), between(layer.v, lambda v: truncate(v, rank))

    def coded_bytes(self, size: Size) -> float:
        """Coefficients and basis of keys and of values, 16 bits a number."""
        channels = size.heads * size.dim
        return 2 * 2 * self.rank(channels) * (size.tokens + channels)
