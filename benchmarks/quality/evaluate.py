"""One method on the prompts of one context length: three tasks, and the bytes it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import passkey
from .metrics import Figure, agreement, bootstrap, first_difference, kl_divergence, share, surprise
from .runner import Runner, Sizes
from .subject import Prompts, Subject

NEXT = 512
"""Tokens behind the context that are teacher-forced."""


class Reference:
    """What the stock model makes of prompts of one length.

    Args:
        subject: the model.
        windows: test windows, int64 ``[B, context + T]``.
        context: tokens that are prefilled; T follow, teacher-forced.
        greedy: tokens of the stock model's continuation that are compared.
        first: number of the first window among all, which its pass key depends on.
    """

    def __init__(
        self, subject: Subject, windows: Tensor, context: int, greedy: int, first: int = 0
    ) -> None:
        self.subject = subject
        self.prompts = Prompts(subject, windows[:, :context].clone())
        self.following = windows[:, context:]  # [B, T]
        self.keys = passkey.make(subject.tokenizer, windows.cpu(), context, first)
        ids = self.keys.ids.to(subject.device)
        self.key_prompts = Prompts(subject, ids[:, :context].clone())
        self.key_following = ids[:, context:]  # [B, passkey.FOLLOWING]
        layers, logits = self.prompts.layers, self.prompts.logits
        kv = [(layer.k, layer.v) for layer in layers]
        # On the host: the vocabulary is wide, and there are many windows.
        self.log_probs = in_log_probs(subject.follow(kv, context, self.following)).cpu()
        self.greedy = subject.continue_greedily(layers, logits, greedy + 1)  # [B, greedy + 1]

    def release(self) -> None:
        """Let go of the dense caches."""
        self.prompts.release()
        self.key_prompts.release()


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


def evaluate(runner: Runner, references: Sequence[Reference]) -> tuple[Scores, Sizes]:
    """All tasks on all windows, and the bytes of the cache."""
    values: dict[str, list[float]] = {}
    for reference in references:
        cache = runner.prefill(reference.prompts)
        found = _next_tokens(runner, reference, cache)
        found["greedy"] = _greedy(runner, reference, cache)
        sizes = runner.sizes(cache)
        del cache
        found["passkeys"] = _passkeys(runner, reference)
        found["depths"] = list(reference.keys.depths)
        for name, new in found.items():
            values.setdefault(name, []).extend(new)
    figures = {
        name: (share if name == "passkeys" else bootstrap)(torch.tensor(values[name]))
        for name in values
        if name != "depths"
    }
    scores = Scores(
        kl=figures["kl"],
        top1=figures["top1"],
        perplexity=_exponential(figures["nll"]),
        perplexity_full=_exponential(figures["nll_full"]),
        greedy=figures["greedy"],
        passkeys=figures["passkeys"],
        by_window=values,
    )
    return scores, sizes


def _next_tokens(runner: Runner, reference: Reference, cache: Any) -> dict[str, list[float]]:
    """Means over the next tokens of each window."""
    coded = in_log_probs(runner.follow(cache, reference.following))
    values: dict[str, list[float]] = {"kl": [], "top1": [], "nll": [], "nll_full": []}
    for full, own, tokens in zip(reference.log_probs, coded, reference.following, strict=True):
        full = full.to(own.device)
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


def _passkeys(runner: Runner, reference: Reference) -> list[float]:
    """1 for each pass key that is found, else 0."""
    cache = runner.prefill(reference.key_prompts)
    predicted = runner.follow(cache, reference.key_following).argmax(-1)
    hits = passkey.found(predicted, reference.key_following, reference.keys.answer)
    return [float(hit) for hit in hits]


def _exponential(figure: Figure) -> Figure:
    return Figure(*(math.exp(value) for value in (figure.mean, figure.low, figure.high)))
