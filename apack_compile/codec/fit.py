r"""From moments to a transform code: weighted PCA and bits by reverse water-filling.

Weights: a code should be best in the metric in which its errors count. That is a
:class:`Sensitivity` where it could be measured, for keys and values; bits then follow it over all
layers (``budget.py``). Else keys minimise E|q.(k - k^)|^2 over the queries that read them: with W
the block-diagonal of E[q q^T] by KV head this is plain PCA of W^(1/2) (k - mean) (kv-compression
facts, 3.3; KQ-SVD, AISTATS 2026); values take plain PCA, and every layer the same bytes.

Bits: component variances lambda_i under a uniform mid-rise quantiser leave D_b lambda_i of
distortion (``quantiser.py``). The classes are given to runs of components in order of variance so
that the sum of distortions is least under the byte budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .bits import CLASSES
from .budget import MOST_LAYOUTS, share_budget
from .code import Code
from .evicting import evicting
from .kinds import balance, kind_error, of_kind, rest
from .layout import KEPT_OF, PARTS
from .moments import Moments
from .quantiser import lacking_quantiser, tailed_quantiser
from .recipe import Recipe
from .rotation import Rotation
from .sensitivity import Sensitivity
from .spectrum import RUN, Spectrum, spectrum
from .tiered import TIERS, felt_error, layout_of, mean_bits
from .transform import GAIN_DTYPE, TransformLayout

RIDGE = 0.1
"""Added to a sensitivity, over its mean: some hundred gradients make it."""


def allocate(variances: Tensor, budget: float, shares: Sequence[int] = ()) -> tuple[int, int, int]:
    """Components with 8, 4 and 2 bits, largest variances first, in at most ``budget`` bytes.

    Args:
        variances: ``[n]``, descending.
        budget: bytes for one token of one group.
        shares: of planes, if the code has any: bits are then counted in the mean over the tokens.

    Returns:
        Three multiples of ``RUN`` with the least total distortion.
    """
    blocks = len(variances) // RUN
    energy = variances[: blocks * RUN].unflatten(0, (blocks, RUN)).sum(1).double()
    cumulative = torch.cat([energy.new_zeros(1), energy.cumsum(0)])
    saved = [1.0 - felt_error(bits, shares) for bits in CLASSES]
    cost = [RUN * mean_bits(bits, shares) / 8 for bits in CLASSES]
    a = torch.arange(blocks + 1)
    n8, n4 = torch.meshgrid(a, a, indexing="ij")
    left = budget - cost[0] * n8 - cost[1] * n4
    n2 = (left / cost[2]).floor().long().clamp(min=0).minimum(blocks - n8 - n4)
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


def choose_layout(
    spectra: Sequence[Spectrum], budget: int, gain: bool, shares: Sequence[int] = (),
    evicted: int = 0,
) -> TransformLayout:  # fmt: skip
    """One layout for layers of one shape: bits by the mean of their relative variances.

    One layout for all keys and one for all values keeps kernels and compile time few.

    Args:
        spectra: of the layers.
        budget: bytes for a token of one layer.
        gain: whether each token and group gets a gain, if the budget has room for it.
        shares: of planes, where there is a gain; none: all tokens have all bits.
        evicted: of ``PARTS`` tokens, how many are dropped: others take their bytes.

    Raises:
        ValueError: no code is that small.
    """
    heads, dim, groups = spectra[0].shape
    relative = [(s.variances / s.variances.sum().clamp_min(1e-30)).cpu() for s in spectra]
    variances = torch.stack(relative).mean((0, 1))
    each = (budget - bool(shares or evicted)) / groups / (1 - evicted / PARTS)
    code_bytes = each - (GAIN_DTYPE.itemsize if gain else 0)
    if gain and code_bytes < RUN // 4:
        each = (budget - bool(evicted)) // groups / (1 - evicted / PARTS)
        code_bytes, gain, shares = each, False, ()
    counts = allocate(variances, code_bytes, shares)
    if not sum(counts):
        raise ValueError(f"{heads} KV heads of {dim} have no code of {budget} bytes a token")
    return evicting(layout_of((heads, dim, groups), counts, gain, shares), evicted)


def quantise(side: Spectrum, layout: TransformLayout, rotation: Rotation | None = None) -> Code:
    """The code of one side with a given layout; a positional one needs the rotation."""
    steps = torch.cat(
        [side.mean.new_full((count,), tailed_quantiser(bits)[0]) for bits, count in layout.runs]
    )
    rank = layout.rank
    deviation = side.variances[:, :rank].sqrt()
    deviation = deviation.clamp_min(deviation.amax(-1, keepdim=True) * 1e-5 + 1e-20)
    step = deviation * steps  # [G, R]
    levels = [_distortion(side, layout, lacking) for _, lacking in layout.tiers]
    distortion = sum(
        (share * left for (share, _), left in zip(layout.tiers, levels, strict=True)),
        side.variances.new_zeros(()),
    ).clamp_min(1e-30)
    expected = distortion.sqrt()
    params = layout.params_of(
        side.mean,
        side.forward[..., :rank] / step[:, None],
        side.backward[:, :rank] * step[:, :, None],
        side.metric / expected,
        step / expected,
        steps.expand(layout.groups, rank) if layout.gain else None,
        side.deviation,
    )
    if layout.tier_shares:
        params.append((torch.stack(levels) / distortion).clamp_min(1e-6).float())
    if layout.positional:
        assert rotation is not None
        params.append(rotation.waves.float().contiguous())
    error = float(distortion / side.variances.sum().clamp_min(1e-30))
    return Code(layout, tuple(params), error)


def _distortion(side: Spectrum, layout: TransformLayout, lacking: int) -> Tensor:
    """Mean squared error of tokens that lack so many bits, in the metric of the basis."""
    distortion = side.variances[:, layout.rank :].sum()
    start = 0
    for bits, count in layout.runs:
        energy = side.variances[:, start : start + count].sum()
        distortion = distortion + lacking_quantiser(bits, lacking)[1] * energy
        start += count
    return distortion


def side_budget(channels: int, ratio: float, kept: int = 0) -> int:
    """Bytes that the code of a token may take, so that all of them take 16 bits over ``ratio``.

    Args:
        channels: numbers of a token.
        ratio: of 16 bits each to what a token takes.
        kept: of ``KEPT_OF`` tokens, how many take 16 bits for each number besides.
    """
    return int(2 * channels / ratio - 2 * channels * kept / KEPT_OF)


@dataclass(frozen=True)
class Evidence:
    """What the code of one layer is fitted from.

    Attributes:
        moments: sums over the tokens to fit on.
        rotation: of its keys by position; the moments are then without it. None: not known.
        sensitivity: None: the weights are second moments of the queries.
        visual: sums over the visual ones of the tokens; None: kinds of tokens are not known.
        kind: of the tokens that the code is for (``kinds.py``); None: for all.
    """

    moments: Moments
    rotation: Rotation | None = None
    sensitivity: Sensitivity | None = None
    visual: Moments | None = None
    kind: int | None = None

    def as_seen(self, reach: int) -> Evidence:
        """The same of keys as attention sees them, at all positions below ``reach``."""
        if self.rotation is None:
            return self
        metric = self.sensitivity and self.sensitivity.spread(self.rotation, reach)
        visual = self.visual and self.visual.spread(self.rotation, reach)
        return Evidence(self.moments.spread(self.rotation, reach), None, metric, visual, self.kind)

    def unrotated(self, reach: int) -> Evidence:
        """The same of keys before their rotation: only queries come from all distances."""
        assert self.rotation is not None
        q_gram = self.rotation.gram(self.moments.q_gram, reach)
        return replace(self, moments=replace(self.moments, q_gram=q_gram))

    def spectra(self, dims: tuple[int, int], recipe: Recipe) -> tuple[Spectrum, Spectrum]:
        """Components of keys and values."""
        if self.kind is None:
            sums = balance(self.moments, self.visual)
        else:
            sums = of_kind(self.moments, self.visual, self.kind)
        count, k_sum, k_gram, v_sum, v_gram, q_gram = sums.tensors()
        turned = recipe.v_basis == "hadamard"
        metric = self.sensitivity
        if metric is None:
            weight = q_gram / q_gram.diagonal(dim1=-2, dim2=-1).sum().clamp_min(1e-30)
            return (
                spectrum(k_sum, k_gram, count, weight, dims[0]),
                spectrum(v_sum, v_gram, count, None, dims[1], rotated=turned),
            )
        return (
            spectrum(k_sum, k_gram, count, metric.k, dims[0], RIDGE),
            spectrum(v_sum, v_gram, count, metric.v, dims[1], RIDGE, turned),
        )

    def judged(self, k: Code, v: Code, keys: Spectrum, values: Spectrum) -> tuple[Code, Code]:
        """Codes made of these components, with their errors on text and on visual tokens."""
        if self.visual is None:
            return k, v
        kinds = rest(self.moments, self.visual), self.visual
        text, image = (
            (
                kind_error(keys, k.layout, m.k_sum, m.k_gram, m.count),
                kind_error(values, v.layout, m.v_sum, m.v_gram, m.count),
            )
            for m in kinds
        )
        return replace(k, kinds=(text[0], image[0])), replace(v, kinds=(text[1], image[1]))


def fit_transform(
    layers: Sequence[Evidence],
    dims: tuple[int, int],
    recipe: Recipe,
    reach: int,
    layouts: Sequence[tuple[TransformLayout, TransformLayout]] | None = None,
    most: int = MOST_LAYOUTS,
) -> list[tuple[Code, Code]]:
    """Codes for K and V of layers of one shape.

    Args:
        layers: either all or none of them with a sensitivity (none: bits by variance, the same
            bytes for all layers), and with a rotation.
        dims: head dimensions of keys and values.
        recipe: its ratio holds for all layers together, gains and exact tokens counted.
        reach: tokens of context that the codes should serve.
        layouts: of each layer, to be kept; None: they are chosen.
        most: different pairs of layouts.

    Raises:
        ValueError: no code is that small.
    """
    rotations = [layer.rotation for layer in layers]
    before = recipe.k_code == "pre-rope" and None not in rotations

    def coded(layer: Evidence) -> Evidence:
        return layer.unrotated(reach) if before else layer.as_seen(reach)

    # Layer by layer: the moments of all layers at once, spread, would take gigabytes.
    keys, values = zip(*(coded(layer).spectra(dims, recipe) for layer in layers), strict=True)
    shares, evicted = TIERS if recipe.tiers else (), recipe.evicted
    # A token has a byte that says of which kind it is, if its levels do not say that as well.
    by_kind = layers[0].kind is not None
    k_budget, v_budget = (
        side_budget(side[0].mean.numel(), recipe.ratio, recipe.kept) - (by_kind and not levels)
        for side, levels in ((keys, evicted), (values, shares or evicted))
    )
    if layouts is None:
        if layers[0].sensitivity is None:
            k_layout = choose_layout(keys, k_budget, False, (), evicted)
            v_layout = choose_layout(values, v_budget, True, shares, evicted)
            layouts = [(k_layout, v_layout)] * len(keys)
        else:
            budget = len(keys) * (k_budget + v_budget)
            layouts = share_budget(keys, values, budget, most, shares, evicted)
        exact = recipe.kept
        layouts = [(replace(k, exact=exact), replace(v, exact=exact)) for k, v in layouts]
        if before:
            layouts = [
                (replace(k, rotary=turn.width, interleaved=int(turn.interleaved)), v)
                for (k, v), turn in zip(layouts, rotations, strict=True)
                if turn is not None
            ]
    return [
        (coded(layer) if layer.visual else layer).judged(
            quantise(k, k_layout, rotation), quantise(v, v_layout), k, v
        )
        for layer, k, v, (k_layout, v_layout), rotation in zip(
            layers, keys, values, layouts, rotations, strict=True
        )
    ]
