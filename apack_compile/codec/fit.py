r"""From moments to a transform code: weighted PCA and bits by reverse water-filling.

Keys: minimise E|q.(k - k^)|^2 over the queries that read them. With W the block-diagonal of
E[q q^T] by KV head this is plain PCA of W^(1/2) (k - mean) (kv-compression facts, 3.3; KQ-SVD,
AISTATS 2026). Values: plain PCA, with a gain per token.

Bits: component variances lambda_i under a uniform mid-rise quantiser leave D_b lambda_i of
distortion (Gaussian constants below, found by numerical search). The classes are given to runs of
components in order of variance so that the sum of distortions is least under the byte budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .bits import CLASSES
from .code import Code
from .moments import Moments
from .transform import GAIN_DTYPE, TransformLayout

RUN = 16
"""Runs are multiples of this many components."""

GROUP = 1024
"""A group of heads has at most this many channels (or is one head): one eigh each."""


MARGIN = {8: 2.5, 4: 1.3, 2: 1.0}
"""Steps used over steps best for a Gaussian. Real components have heavier tails, and a clipped
outlier costs far more than coarser steps: on SmolLM2 at ratio 4 this divides the KL by six."""


def _error(step: float, bits: int) -> float:
    """Mean squared error for a unit Gaussian, mid-rise, ``2**bits`` levels."""
    grid = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2)
    half = 2 ** (bits - 1)
    codes = (grid / step).floor().clamp(-half, half - 1) + 0.5
    return float((density / density.sum() * (grid - codes * step).square()).sum())


@cache
def uniform_quantiser(bits: int) -> tuple[float, float]:
    """Best step and its mean squared error for a unit Gaussian."""
    candidates = torch.linspace(0.5, 2.0, 301, dtype=torch.float64) * 8.0 / 2**bits
    error, step = min((_error(float(step), bits), float(step)) for step in candidates)
    return step, error


@cache
def tailed_quantiser(bits: int) -> tuple[float, float]:
    """The step that is used, wider by ``MARGIN``, and its error for a unit Gaussian."""
    step = uniform_quantiser(bits)[0] * MARGIN[bits]
    return step, _error(step, bits)


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


def allocate(variances: Tensor, budget: int) -> tuple[int, int, int]:
    """Components with 8, 4 and 2 bits, largest variances first, in at most ``budget`` bytes.

    Args:
        variances: ``[n]``, descending.
        budget: bytes for one token of one group.

    Returns:
        Three multiples of ``RUN`` with the least total distortion.
    """
    blocks = len(variances) // RUN
    energy = variances[: blocks * RUN].unflatten(0, (blocks, RUN)).sum(1).double()
    cumulative = torch.cat([energy.new_zeros(1), energy.cumsum(0)])
    saved = [1.0 - tailed_quantiser(bits)[1] for bits in CLASSES]
    a = torch.arange(blocks + 1)
    n8, n4 = torch.meshgrid(a, a, indexing="ij")
    left = budget - RUN * n8 - RUN // 2 * n4
    n2 = (left.div(RUN // 4, rounding_mode="floor")).clamp(min=0).minimum(blocks - n8 - n4)
    fits = (left >= 0) & (n8 + n4 <= blocks)
    n4_end = (n8 + n4).clamp(max=blocks)
    n2_end = (n4_end + n2.clamp(min=0)).clamp(max=blocks)
    kept = (
        saved[0] * cumulative[n8]
        + saved[1] * (cumulative[n4_end] - cumulative[n8])
        + saved[2] * (cumulative[n2_end] - cumulative[n4_end])
    )
    best = torch.where(fits, kept, -1.0).argmax()
    counts = [int(n.flatten()[best].clamp(min=0)) * RUN for n in (n8, n4, n2)]
    return counts[0], counts[1], counts[2]


@dataclass(frozen=True)
class Spectrum:
    """The weighted principal components of one side of one layer.

    Attributes:
        dim: head_dim.
        mean: ``[G, n]``, by group of heads.
        variances: ``[G, n]``, descending.
        forward: ``[G, n, n]``, from centred tokens to components (columns).
        backward: ``[G, n, n]``, from components (rows) to tokens.
    """

    dim: int
    mean: Tensor
    variances: Tensor
    forward: Tensor
    backward: Tensor

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.mean.numel() // self.dim

    @property
    def shape(self) -> tuple[int, int, int]:
        """Heads, head_dim, groups: layers that agree in these can share a layout."""
        return self.heads, self.dim, self.mean.shape[0]


def spectrum(
    total: Tensor, gram: Tensor, count: Tensor, weight: Tensor | None, dim: int
) -> Spectrum:
    """Weighted PCA of one side.

    Args:
        total: sum of tokens ``[H * D]``; gram: sum of outer products ``[H * D, H * D]``.
        count: tokens.
        weight: ``[H, D, D]``, the metric by KV head, or None for the plain one.
        dim: head_dim D.
    """
    heads = total.numel() // dim
    groups = head_groups(heads, dim)
    n = heads // groups * dim
    mean = (total / count).view(groups, n)
    second = torch.stack([gram[g * n : (g + 1) * n, g * n : (g + 1) * n] for g in range(groups)])
    cov = second / count - mean[:, :, None] * mean[:, None, :]  # [G, n, n]
    if weight is None:
        root = inverse = torch.eye(n, dtype=cov.dtype, device=cov.device).expand(groups, n, n)
    else:
        ridge = weight.diagonal(dim1=-2, dim2=-1).mean(-1) * 1e-3 + 1e-30  # [H]
        weight = weight + ridge[:, None, None] * torch.eye(dim, device=weight.device)
        blocks = [_root(part) for part in weight.view(groups, -1, dim, dim)]
        root = torch.stack([torch.block_diag(*r) for r, _ in blocks])
        inverse = torch.stack([torch.block_diag(*i) for _, i in blocks])
    variances, basis = torch.linalg.eigh(root @ cov @ root)
    variances, basis = variances.flip(-1).clamp_min(0), basis.flip(-1)  # descending
    return Spectrum(dim, mean, variances, root @ basis, basis.transpose(-1, -2) @ inverse)


def choose_layout(spectra: Sequence[Spectrum], budget: int, gain: bool) -> TransformLayout:
    """One layout for layers of one shape: bits by the mean of their relative variances.

    One layout for all keys and one for all values keeps kernels and compile time few.

    Args:
        spectra: of the layers.
        budget: bytes for a token of one layer.
        gain: whether each token and group gets a gain, if the budget has room for it.

    Raises:
        ValueError: no code is that small.
    """
    heads, dim, groups = spectra[0].shape
    relative = [s.variances / s.variances.sum().clamp_min(1e-30) for s in spectra]
    variances = torch.stack(relative).mean((0, 1)).cpu()
    code_bytes = budget // groups - (GAIN_DTYPE.itemsize if gain else 0)
    if gain and code_bytes < RUN // 4:
        code_bytes, gain = budget // groups, False
    counts = allocate(variances, code_bytes)
    if not sum(counts):
        raise ValueError(f"{heads} KV heads of {dim} have no code of {budget} bytes a token")
    return TransformLayout(heads, dim, groups, *counts, int(gain))


def quantise(side: Spectrum, layout: TransformLayout) -> Code:
    """The code of one side with a given layout."""
    steps = torch.cat(
        [side.mean.new_full((count,), tailed_quantiser(bits)[0]) for bits, count in layout.runs]
    )
    rank = layout.rank
    deviation = side.variances[:, :rank].sqrt()
    deviation = deviation.clamp_min(deviation.amax(-1, keepdim=True) * 1e-5 + 1e-20)
    step = deviation * steps  # [G, R]
    params = [
        side.mean,
        side.forward[..., :rank] / step[:, None],
        side.backward[:, :rank] * step[:, :, None],
    ]
    if layout.gain:
        params.append(steps.expand(layout.groups, rank))
    distortion = side.variances[:, rank:].sum()
    start = 0
    for bits, count in layout.runs:
        energy = side.variances[:, start : start + count].sum()
        distortion = distortion + tailed_quantiser(bits)[1] * energy
        start += count
    error = float(distortion / side.variances.sum().clamp_min(1e-30))
    return Code(layout, tuple(p.float().contiguous() for p in params), error)


def side_budget(channels: int, ratio: float) -> int:
    """Bytes a token of ``channels`` numbers may take: 16 bits each over ``ratio``."""
    return int(2 * channels / ratio)


def fit_transform(
    moments: Sequence[Moments], dim_k: int, dim_v: int, ratio: float
) -> list[tuple[Code, Code]]:
    """Codes for K and V of layers of one shape at ``ratio`` against 16 bits a number.

    Args:
        moments: of each layer, sums over the tokens to fit on.
        dim_k, dim_v: head dimensions.
        ratio: dense 16-bit bytes over coded bytes, gains counted.

    Raises:
        ValueError: no code is that small.
    """
    keys, values = [], []
    for layer in moments:
        count, k_sum, k_gram, v_sum, v_gram, q_gram = (t.double() for t in layer.tensors())
        weight = q_gram / q_gram.diagonal(dim1=-2, dim2=-1).sum().clamp_min(1e-30)
        keys.append(spectrum(k_sum, k_gram, count, weight, dim_k))
        values.append(spectrum(v_sum, v_gram, count, None, dim_v))
    k_layout = choose_layout(keys, side_budget(keys[0].mean.numel(), ratio), gain=False)
    v_layout = choose_layout(values, side_budget(values[0].mean.numel(), ratio), gain=True)
    return [
        (quantise(k, k_layout), quantise(v, v_layout)) for k, v in zip(keys, values, strict=True)
    ]
