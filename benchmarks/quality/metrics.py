"""Figures of two predictions of the same tokens, and intervals of their means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 10_000

ALPHA = 0.05
"""Intervals leave so much out, half at each end."""


@dataclass(frozen=True)
class Figure:
    """A mean over windows with its interval.

    Attributes:
        mean: over the windows.
        low, high: ends of the 95 % interval.
    """

    mean: float
    low: float
    high: float


def kl_divergence(full: Tensor, coded: Tensor) -> Tensor:
    """KL(full || coded) of each token, in nats.

    Args:
        full, coded: log-probabilities ``[..., V]``.
    """
    return (full.exp() * (full - coded)).sum(-1)


def agreement(full: Tensor, coded: Tensor) -> Tensor:
    """1 where both predict the same token, else 0; of ``[..., V]``."""
    return (full.argmax(-1) == coded.argmax(-1)).to(full.dtype)


def surprise(predictions: Tensor, tokens: Tensor) -> Tensor:
    """-log p of the tokens that came, in nats.

    Args:
        predictions: log-probabilities ``[T, V]``; row t predicts token t + 1.
        tokens: ``[T]``; the first one is not predicted.

    Returns:
        ``[T - 1]``.
    """
    return -predictions[:-1].gather(-1, tokens[1:, None])[:, 0]


def first_difference(predicted: Tensor, tokens: Tensor) -> int:
    """How many of ``tokens [T]`` come before the first that was not ``predicted [T]``."""
    wrong = (predicted != tokens).nonzero()
    return int(wrong[0]) if len(wrong) else len(tokens)


def bootstrap(values: Tensor, seed: int = 0) -> Figure:
    """Mean of one value a window, with its 95 % percentile bootstrap interval.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Args:
        values: ``[n]``.
        seed: of the resampling.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("values is empty: accepted is one value or more")
    values = values.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = values[rows].mean(1)  # [RESAMPLES]
    ends = torch.tensor([ALPHA / 2, 1 - ALPHA / 2], dtype=torch.float64)
    low, high = means.quantile(ends).tolist()
    return Figure(float(values.mean()), low, high)


def share(values: Tensor, least: float = 0.0) -> Figure:
    """Mean of shares, one a window, with its 95 % interval: the bootstrap's if they differ.

    Where all are 0 or all are 1, every resample is the same, which says nothing of the next window.
    The interval is then that of Clopper and Pearson (Biometrika 26, 1934) for as many trials as
    there are windows: from 0 to 1 - (alpha / 2)^(1/n), or the same from 1 downwards.

    Args:
        values: ``[n]``, from ``least`` to 1.
        least: 0; or -1, if they are differences of shares. Where all of those are 0, neither sign
            was seen, and either may be that frequent.

    Raises:
        ValueError: no values, or some that are no shares.
    """
    figure = bootstrap(values)
    if not least <= values.min() <= values.max() <= 1:
        raise ValueError(
            f"values from {values.min()} to {values.max()}: accepted is {least:g} to 1"
        )
    if figure.mean not in (least, 0, 1) or values.min() < values.max():
        return figure
    width = 1 - (ALPHA / 2) ** (1 / len(values))
    return Figure(figure.mean, max(figure.mean - width, least), min(figure.mean + width, 1.0))
