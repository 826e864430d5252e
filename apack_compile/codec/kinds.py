r"""Text and visual tokens in one fit: neither kind is forgotten, and each has an error of its own.

An image brings hundreds of tokens where a question brings ten, or the other way round. A basis
fitted on all of them serves the many. So a token of the rarer kind counts more: as much as it
takes for the kind to have a quarter of the weight, but never more than eight times, for a handful
of tokens say little of their kind:

    w = min(8, n_many / (3 n_few)),     E[x x^T] ~ (sum_many x x^T + w sum_few x x^T)

Queries keep their own weight: who reads does not depend on what is read. One kind alone gets the
error that its second moments S_r about the mean of the code leave in the components r: all of S_r
if the component is not stored, else what a quantiser made for the variance lambda_r leaves of a
Gaussian of variance S_r. Gains follow the size of a token, so that with them only the shape counts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from .layout import Layout
from .moments import Moments
from .quantiser import lacking_quantiser
from .spectrum import Spectrum, blocks_of
from .transform import TransformLayout

LEAST_SHARE = 0.25
"""Of the weight, for each kind of tokens."""

MOST_WEIGHT = 8.0
"""Times that a token of the rarer kind counts."""

DECADES, POINTS = 8, 40
"""Range and points a decade of the table of a quantiser's errors."""


def rest(total: Moments, part: Moments) -> Moments:
    """Sums over the tokens of ``total`` that are not in ``part``."""
    pairs = zip(total.tensors(), part.tensors(), strict=True)
    return Moments(*(every - some for every, some in pairs))


def token_weights(text: float, visual: float) -> tuple[float, float]:
    """What a token of each kind counts, by the numbers of tokens."""
    few, many = sorted((text, visual))
    if not few or few >= LEAST_SHARE * (few + many):
        return 1.0, 1.0
    more = min(LEAST_SHARE / (1 - LEAST_SHARE) * many / few, MOST_WEIGHT)
    return (more, 1.0) if text < visual else (1.0, more)


def balance(total: Moments, visual: Moments | None) -> Moments:
    """Moments in which no kind of tokens is negligible because of its number.

    Args:
        total: sums over all tokens.
        visual: sums over the visual ones among them; None: no kinds are known.
    """
    if visual is None:
        return total
    text = rest(total, visual)
    weights = token_weights(float(text.count), float(visual.count))
    if weights == (1.0, 1.0):
        return total
    pairs = zip(text.tensors(), visual.tensors(), strict=True)
    sums = (weights[0] * a + weights[1] * b for a, b in pairs)
    return replace(Moments(*sums), q_gram=total.q_gram)


TEXT, VISUAL = 0, 1
"""Kinds of tokens, as they are counted and stored."""

KINDS = 2


def least_tokens(channels: int) -> int:
    """Tokens of ``channels`` numbers that a basis wants to be fitted on."""
    return min(4 * channels, 1024)


def of_kind(total: Moments, visual: Moments | None, kind: int) -> Moments:
    """Moments for the code of one kind of tokens: of its own, where there are enough; else of all.

    Args:
        total: sums over all tokens.
        visual: sums over the visual ones among them; None: no kinds are known.
        kind: :data:`TEXT` or :data:`VISUAL`.
    """
    if visual is None:
        return total
    own = visual if kind == VISUAL else rest(total, visual)
    if float(own.count) < least_tokens(own.k_sum.numel()):
        return balance(total, visual)
    return replace(own, q_gram=total.q_gram)


def kind_error(side: Spectrum, layout: Layout, total: Tensor, gram: Tensor, count: Tensor) -> float:
    """Relative squared error of a code on one kind of tokens, in the metric of its basis.

    Args:
        side: what the code was made of.
        layout: its layout.
        total, gram, count: of the tokens: sum ``[H * D]``, of outer products by group, number.

    Returns:
        The error over the energy of the tokens about the mean of the code; NaN without tokens.
    """
    assert isinstance(layout, TransformLayout)
    if not float(count):
        return float("nan")
    energy = _energy(side, total, gram, count)  # [G, n]
    rank = layout.rank
    made_for = side.variances[:, :rank]
    made_for = made_for.clamp_min(made_for.amax(-1, keepdim=True) * 1e-10 + 1e-40)
    ratio = energy[:, :rank] / made_for
    gain = ratio.mean(-1, keepdim=True) if layout.gain else torch.ones_like(ratio[:, :1])  # [G, 1]
    error = energy[:, rank:].sum()
    start = 0
    for bits, number in layout.runs:
        run = slice(start, start + number)
        for share, lacking in layout.tiers:
            left = _quantiser_error(bits, ratio[:, run] / gain, lacking)
            error = error + share * (gain * made_for[:, run] * left).sum()
        start += number
    return float(error / energy.sum().clamp_min(1e-30))


def _energy(side: Spectrum, total: Tensor, gram: Tensor, count: Tensor) -> Tensor:
    """Second moments of tokens about the mean of the code, by component: ``[G, n]``."""
    groups, n = side.mean.shape
    centre, mean = side.mean.double(), (total / count).view(groups, n)
    second = blocks_of(gram, groups)
    cross = mean[:, :, None] * centre[:, None]
    about = second / count - cross - cross.mT + centre[:, :, None] * centre[:, None]
    return ((about @ side.forward.double()) * side.forward.double()).sum(1).clamp_min(0)


def _quantiser_error(bits: int, ratio: Tensor, lacking: int = 0) -> Tensor:
    """Mean squared error of a quantiser for unit variance on Gaussians of variance ``ratio``."""
    if lacking >= bits:
        return ratio
    table = _table(bits, lacking).to(ratio.device)
    place = (ratio.clamp(10.0**-DECADES, 10.0**DECADES).log10() + DECADES) * POINTS
    low = place.floor().long().clamp(max=len(table) - 2)
    return torch.lerp(table[low], table[low + 1], place - low).exp()


@cache
def _table(bits: int, lacking: int) -> Tensor:
    """Logarithms of the errors on Gaussians whose variances go up in equal factors."""
    step, half = lacking_quantiser(bits, lacking)[0], 2 ** (bits - lacking - 1)
    grid = torch.linspace(-8, 8, 8001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2)
    density = density / density.sum()
    errors = []
    for decade in torch.linspace(-DECADES, DECADES, 2 * DECADES * POINTS + 1, dtype=torch.float64):
        x = grid * 10 ** (decade / 2)
        back = ((x / step).floor().clamp(-half, half - 1) + 0.5) * step
        errors.append((density * (x - back).square()).sum())
    return torch.stack(errors).log()
