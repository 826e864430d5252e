"""One method on the prompts of one context length: three tasks, and the bytes it takes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import passkey
from .metrics import Figure, agreement, bootstrap, first_difference, kl_divergence, surprise
from .runner import Runner
from .subject import Prompts, Subject

NEXT = 512
"""Tokens behind the context that are teacher-forced."""


class Reference:
    """What the stock model makes of the prompts of one length.

    Args:
        subject: the model.
        windows: test windows, int64 ``[B, context + T]``.
        context: tokens that are prefilled; T follow, teacher-forced.
        greedy: tokens of the stock model's continuation that are compared.
    """

    def __init__(self, subject: Subject, windows: Tensor, context: int, greedy: int) -> None:
        self.subject = subject
        self.context = context
        self.steps = greedy
        self.prompts = Prompts(subject, windows[:, :context].clone())
        self.following = windows[:, context:]  # [B, T]
        self.keys = passkey.make(subject.tokenizer, windows.cpu(), context)
        ids = self.keys.ids.to(subject.device)
        self.key_prompts = Prompts(subject, ids[:, :context].clone())
        self.key_following = ids[:, context:]  # [B, passkey.FOLLOWING]

    @cached_property
    def log_probs(self) -> Tensor:
        """Of the tokens that follow, by the stock model: ``[B, T, V]``."""
        kv = [(layer.k, layer.v) for layer in self.prompts.layers]
        return in_log_probs(self.subject.follow(kv, self.context, self.following))

    @cached_property
    def greedy(self) -> Tensor:
        """The stock model's continuation ``[B, greedy + 1]``."""
        layers, logits = self.prompts.prefilled
        return self.subject.continue_greedily(layers, logits, self.steps + 1)


@dataclass(frozen=True)
class Scores:
    """What one method scored.

    Attributes:
        kl: KL(full || coded) per token, in nats.
        top1: share of tokens where both predict the same.
        perplexity, perplexity_full: of the text, by the coded and by the stock model.
        greedy: tokens of the stock model's greedy continuation before the first that differs;
            all of them if none does.
        passkeys: share of pass keys that are found.
        by_window: the values behind them, one a window or prompt.
    """

    kl: Figure
    top1: Figure
    perplexity: Figure
    perplexity_full: Figure
    greedy: Figure
    passkeys: Figure
    by_window: dict[str, list[float]]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def in_log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities of logits ``[B, T, V]``, row by row in their place."""
    for row in logits:
        row.copy_(row.float().log_softmax(-1))
    return logits


def evaluate(runner: Runner, reference: Reference) -> tuple[Scores, Any]:
    """All tasks; the cache of the windows comes back as well, for its bytes."""
    cache = runner.prefill(reference.prompts)
    values = _next_tokens(runner, reference, cache)
    values["greedy"] = _greedy(runner, reference, cache)
    key_cache = runner.prefill(reference.key_prompts)
    logits = runner.follow(key_cache, reference.key_following)
    hits = passkey.found(logits.argmax(-1), reference.key_following, reference.keys.answer)
    values["passkeys"] = [float(hit) for hit in hits]
    values["depths"] = list(reference.keys.depths)
    figures = {name: bootstrap(torch.tensor(values[name])) for name in values if name != "depths"}
    scores = Scores(
        kl=figures["kl"],
        top1=figures["top1"],
        perplexity=_exponential(figures["nll"]),
        perplexity_full=_exponential(figures["nll_full"]),
        greedy=figures["greedy"],
        passkeys=figures["passkeys"],
        by_window=values,
    )
    return scores, cache


def _next_tokens(runner: Runner, reference: Reference, cache: Any) -> dict[str, list[float]]:
    """Means over the next tokens of each window."""
    coded = in_log_probs(runner.follow(cache, reference.following))
    values: dict[str, list[float]] = {"kl": [], "top1": [], "nll": [], "nll_full": []}
    for full, own, tokens in zip(reference.log_probs, coded, reference.following, strict=True):
        values["kl"].append(float(kl_divergence(full, own).mean()))
        values["top1"].append(float(agreement(full, own).mean()))
        values["nll"].append(float(surprise(own, tokens).mean()))
        values["nll_full"].append(float(surprise(full, tokens).mean()))
    return values


def _greedy(runner: Runner, reference: Reference, cache: Any) -> list[float]:
    """Tokens before free-running greedy decoding would first differ.

    Up to there the coded model has generated what the stock model has, so that feeding it the
    stock model's tokens shows the same. The very first token comes from the prefill, which is
    not coded.
    """
    tokens = reference.greedy
    predicted = runner.follow(cache, tokens[:, :-1]).argmax(-1)  # [B, greedy]
    return [
        float(first_difference(row, wanted))
        for row, wanted in zip(predicted, tokens[:, 1:], strict=True)
    ]


def _exponential(figure: Figure) -> Figure:
    return Figure(*(math.exp(value) for value in (figure.mean, figure.low, figure.high)))
