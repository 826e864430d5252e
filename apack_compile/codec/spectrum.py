"""Weighted principal components of one side of one layer, from its moments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

RUN = 16
"""Runs are multiples of this many components."""

GROUP = 512
"""A group of heads has at most this many channels (or is one head): one eigh each."""


def _root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and its inverse of positive definite ``[..., D, D]``."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(values[..., -1:] * 1e-6)[..., None, :].sqrt()
    transposed = vectors.transpose(-1, -2)
    return (vectors * values) @ transposed, (vectors / values) @ transposed


def head_groups(heads: int, dim: int) -> int:
    """The fewest groups of equal size in which a group has at most ``GROUP`` channels."""
    for groups in range(1, heads + 1):
        if heads % groups == 0 and heads // groups * dim <= GROUP:
            return groups
    return heads


def blocks_of(gram: Tensor, groups: int) -> Tensor:
    """The blocks of ``[G, n, n]`` on the diagonal that belong to ``groups`` smaller groups."""
    parts = groups // len(gram)
    split = gram.unflatten(2, (parts, -1)).unflatten(1, (parts, -1))  # [G, P, n/P, P, n/P]
    return split.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)


@dataclass(frozen=True)
class Spectrum:
    """The weighted principal components of one side of one layer.

    Attributes:
        dim: head_dim.
        mean: ``[G, n]`` float64, by group of heads.
        variances: ``[G, n]`` float64, descending.
        forward: ``[G, n, n]`` float32, from centred tokens to components (columns).
        backward: ``[G, n, n]`` float32, from components (rows) to tokens.
        metric: ``[H, D, D]`` float64, the root of the weight.
        deviation: the largest standard deviation of a channel.
    """

    dim: int
    mean: Tensor
    variances: Tensor
    forward: Tensor
    backward: Tensor
    metric: Tensor
    deviation: Tensor

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.mean.numel() // self.dim

    @property
    def shape(self) -> tuple[int, int, int]:
        """Heads, head_dim, groups: layers that agree in these can share a layout."""
        return self.heads, self.dim, self.mean.shape[0]


def spectrum(
    total: Tensor, gram: Tensor, count: Tensor, weight: Tensor | None, dim: int,
    ridge: float = 1e-3,
    rotated: bool = False,
) -> Spectrum:  # fmt: skip
    """Weighted PCA of one side, or a rotation of each head that no data decides.

    Args:
        total: sum of tokens ``[H * D]``; gram: sums of outer products by group, ``[G, n, n]``.
        count: tokens.
        weight: ``[H, D, D]``, the metric by KV head, or None for the plain one.
        dim: head_dim D.
        ridge: share of the mean weight that is added everywhere: weights are estimates.
        rotated: a group is one head, and its basis :func:`spreading_rotation`; of the weight only
            its mean by head counts.
    """
    heads = total.numel() // dim
    if rotated:
        gram = blocks_of(gram, heads)
    groups, n, _ = gram.shape
    mean = (total / count).view(groups, n)
    cov = gram / count - mean[:, :, None] * mean[:, None, :]  # [G, n, n]
    deviation = cov.diagonal(dim1=-2, dim2=-1).amax().clamp_min(0).sqrt()
    if rotated:
        size = torch.ones(heads, dtype=cov.dtype, device=cov.device)
        if weight is not None:
            size = weight.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30).sqrt()
        turn = spreading_rotation(dim).to(cov)
        forward = turn * size[:, None, None]
        variances = (forward.mT @ cov @ forward).diagonal(dim1=-2, dim2=-1).clamp_min(0)
        order = variances.argsort(-1, descending=True)  # [G, n]
        forward = forward.gather(2, order[:, None].expand_as(forward))
        backward = forward.mT / size[:, None, None].square()
        metric = torch.eye(dim, dtype=cov.dtype, device=cov.device) * size[:, None, None]
        variances = variances.gather(1, order)
        return Spectrum(dim, mean, variances, forward.float(), backward.float(), metric, deviation)
    if weight is None:
        metric = torch.eye(dim, dtype=cov.dtype, device=cov.device).expand(heads, dim, dim)
        root = inverse = torch.eye(n, dtype=cov.dtype, device=cov.device).expand(groups, n, n)
    else:
        floor = weight.diagonal(dim1=-2, dim2=-1).mean() * ridge + 1e-30
        weight = weight + floor * torch.eye(dim, device=weight.device)
        blocks = [_root(part) for part in weight.view(groups, -1, dim, dim)]
        metric = torch.cat([r for r, _ in blocks])
        root = torch.stack([torch.block_diag(*r) for r, _ in blocks])
        inverse = torch.stack([torch.block_diag(*i) for _, i in blocks])
    variances, basis = torch.linalg.eigh(root @ cov @ root)
    variances, basis = variances.flip(-1).clamp_min(0), basis.flip(-1)  # descending
    forward, backward = (root @ basis).float(), (basis.mT @ inverse).float()
    return Spectrum(dim, mean, variances, forward, backward, metric, deviation)


@cache
def spreading_rotation(dim: int) -> Tensor:
    """An orthogonal matrix that spreads every component over all: ``[D, D]`` float64.

    A Hadamard matrix with random signs (QuaRot, NeurIPS 2024) where ``dim`` is a power of two,
    else a random rotation.
    """
    generator = torch.Generator().manual_seed(0)
    if dim & (dim - 1):
        normal = torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu")
        return torch.linalg.qr(normal)[0]
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(matrix) < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    signs = torch.randint(0, 2, (dim, 1), generator=generator, device="cpu") * 2.0 - 1.0
    return matrix * signs / dim**0.5
