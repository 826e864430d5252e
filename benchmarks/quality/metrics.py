"""Figures of two predictions of the same tokens, and intervals of their means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 10_000


@dataclass(frozen=True)
class Figure:
    """A mean over windows with its interval.

    Attributes:
        mean: over the windows.
        low, high: ends of the 95 % bootstrap interval.
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
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Figure(float(values.mean()), low, high)
