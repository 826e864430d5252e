"""One method on albums of images: are questions behind them answered as with the dense cache?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .albums import KINDS, Albums, Asked, batches
from .metrics import agreement, bootstrap, kl_divergence, share
from .runner import Runner, Setting, Sizes
from .subject import Prompts

HELD = 20e9
"""Bytes of dense caches that are kept for the next rival; more are made anew."""


class Answers:
    """What the stock model answers.

    Args:
        setting: the model.
        asked: contexts of one length.

    Attributes:
        prompts: the albums.
        following: questions and answers behind them, ``[B, T]``.
        logits: of the stock model, before every token of an answer; for each row ``[A, V]``, on
            the host, in the model's dtype.
        right: of the stock model: see :func:`exact`.
    """

    def __init__(self, setting: Setting, asked: Asked) -> None:
        subject = setting.subject
        self.asked = asked
        self.prompts = Prompts(subject, asked.prompts.to(subject.device))
        self.following = asked.following.to(subject.device)
        kv = [(layer.k, layer.v) for layer in self.prompts.layers]
        logits = subject.follow(kv, self.prompts.length, self.following)  # [B, T, V]
        self.logits = [
            row[places].cpu() for row, places in zip(logits, self.places(), strict=True)
        ]  # fmt: skip
        self.right = exact(logits, asked)

    def places(self) -> Iterator[Tensor]:
        """For each row, the places ``[A]`` in ``following`` of the tokens before answers'."""
        for spans in self.asked.spans:
            yield torch.cat([torch.arange(start, end) for start, end in spans]) - 1

    def release(self) -> None:
        """Let go of the dense cache."""
        self.prompts.release()


def exact(logits: Tensor, asked: Asked) -> dict[str, list[float]]:
    """Share of each row's answers that greedy decoding gives to their end, by task.

    It gives an answer if and only if every token of it is the most likely behind those before.

    Args:
        logits: behind each of the tokens that follow, ``[B, T, V]``.
        asked: what they are.
    """
    predicted = logits.argmax(-1)[:, :-1].cpu()
    hits = (predicted == asked.following[:, 1:]).tolist()
    shares: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for row, spans, kinds in zip(hits, asked.spans, asked.kinds, strict=True):
        right = [all(row[start - 1 : end - 1]) for start, end in spans]
        for kind in KINDS:
            own = [hit for hit, k in zip(right, kinds, strict=True) if k == kind]
            shares[kind].append(sum(own) / len(own))
    return shares


class AnswerSuite:
    """The stock model's side of every length, and how methods are scored beside it.

    Args:
        setting: the model.
        albums: the contexts.
        batch: contexts that are run together.
    """

    def __init__(self, setting: Setting, albums: Albums, batch: int) -> None:
        self.setting = setting
        self.albums = albums
        self.batch = batch
        self._made: dict[int, list[Answers]] = {}

    def at(self, context: int, dense: bool) -> list[Answers]:
        """One reference for each batch of contexts.

        Args:
            context: tokens of a context, at most.
            dense: whether dense caches will be used.
        """
        for other, answers in self._made.items():
            if other != context or not dense:
                for one in answers:
                    one.release()
        if context not in self._made:
            made = []
            for asked in batches(self.albums.at(context), self.batch):
                made.append(Answers(self.setting, asked))
                if not dense or self._heavy(context):
                    made[-1].release()
            self._made[context] = made
        return self._made[context]

    def _heavy(self, context: int) -> bool:
        subject = self.setting.subject
        width = 2 * subject.layers * subject.heads * subject.dim * subject.model.dtype.itemsize
        return context * self.albums.count * width > HELD

    def score(
        self, runner: Runner, references: Sequence[Answers], context: int
    ) -> tuple[dict[str, Any], Sizes]:
        """Figures of a method, and the bytes of its cache.

        Returns:
            ``kl`` and ``top1`` over the tokens of answers; for each task the share of right
            answers, and in ``lost`` that of the dense cache less it, in pairs. In ``by_window`` a
            digit for each context: how many of its answers were right.
        """
        values: dict[str, list[float]] = {"kl": [], "top1": [], **{kind: [] for kind in KINDS}}
        lost: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for reference in references:
            cache = runner.prefill(reference.prompts)
            logits = runner.follow(cache, reference.following)  # [B, T, V]
            sizes = runner.sizes(cache)
            del cache
            if self._heavy(context):
                reference.release()
            for own, dense, at in zip(logits, reference.logits, reference.places(), strict=True):
                full = dense.to(own.device).float().log_softmax(-1)  # [A, V]
                coded = own[at.to(own.device)].float().log_softmax(-1)
                values["kl"].append(float(kl_divergence(full, coded).mean()))
                values["top1"].append(float(agreement(full, coded).mean()))
            for kind, shares in exact(logits, reference.asked).items():
                values[kind] += shares
                before = reference.right[kind]
                lost[kind] += [b - s for b, s in zip(before, shares, strict=True)]
        scores: dict[str, Any] = {
            name: asdict((share if name in KINDS else bootstrap)(torch.tensor(some)))
            for name, some in values.items()
        }
        scores["lost"] = {k: asdict(share(torch.tensor(some), -1.0)) for k, some in lost.items()}
        kinds = references[0].asked.kinds[0]
        counts = {
            kind: "".join(str(round(share * kinds.count(kind))) for share in values[kind])
            for kind in KINDS
        }
        return {**scores, "by_window": counts}, sizes

    def line(self, cell: dict[str, Any]) -> str:
        """A cell in a line."""
        shares = ", ".join(f"{kind} {cell[kind]['mean']:.3f}" for kind in KINDS)
        return (
            f"{cell['method']}, {cell['context']} tokens: ratio {cell['ratio']:.2f}, KL "
            f"{cell['kl']['mean']:.5f}, top-1 {cell['top1']['mean']:.4f}, {shares}; "
            f"{cell['seconds']:.0f} s"
        )
