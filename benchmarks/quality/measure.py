"""Measure cell after cell: every method of a run at every context length."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .documents import windows
from .evaluate import NEXT, Reference, evaluate
from .jobs import Claims
from .method import Method
from .results import Results
from .runner import Runner, Setting, Sizes, Unavailable


@dataclass(frozen=True)
class Run:
    """What is measured.

    Attributes:
        name: of the result file.
        contexts: tokens that are prefilled.
        windows: test windows, one a document.
        greedy: tokens of greedy decoding that are compared.
        part: of which methods' ``runs``.
        batch: windows that are run together.
    """

    name: str
    contexts: tuple[int, ...]
    windows: int
    greedy: int
    part: str
    batch: int


class Clock:
    """Says when to stop.

    Args:
        minutes: that may pass; None: any.
    """

    def __init__(self, minutes: float | None) -> None:
        self.started = time.monotonic()
        self.limit = float("inf") if minutes is None else 60 * minutes
        self.longest = 0.0

    def has_time(self) -> bool:
        """Whether a cell as long as the longest yet would end in time."""
        return time.monotonic() - self.started + self.longest <= self.limit


class Suite(Protocol):
    """What methods are measured on."""

    def at(self, context: int, dense: bool) -> list[Any]:
        """The stock model's side of a context length; with dense caches, if those are used."""

    def score(
        self, runner: Runner, references: Sequence[Any], context: int
    ) -> tuple[dict[str, Any], Sizes]:
        """Figures of a method for its cell, and the bytes of its cache."""

    def line(self, cell: dict[str, Any]) -> str:
        """A cell in a line."""


class References:
    """Prose and pass keys. What the stock model makes of them is made when first needed."""

    def __init__(self, run: Run, setting: Setting) -> None:
        self.run = run
        self.subject = setting.subject
        length = max(run.contexts) + NEXT
        texts = windows(self.subject.tokenizer, "test", run.windows, length)
        self.texts: Tensor = texts.to(self.subject.device)  # [windows, length]
        self._made: dict[int, list[Reference]] = {}

    def at(self, context: int, dense: bool) -> list[Reference]:
        """One reference for each batch of windows.

        Args:
            context: tokens that are prefilled.
            dense: whether dense caches will be used. Those of other lengths are let go of, and
                are made again when they are needed again.
        """
        batches = self.texts[:, : context + NEXT].split(self.run.batch)
        for other, made in self._made.items():
            if other != context or not dense:
                _release(made)
        if context not in self._made:
            made = []
            for number, ids in enumerate(batches):
                first = number * self.run.batch
                reference = Reference(self.subject, ids, context, self.run.greedy, first)
                made.append(reference)
                if not dense:
                    reference.release()
            self._made[context] = made  # all or none: making them may run out of memory
        return self._made[context]

    def score(
        self, runner: Runner, references: Sequence[Reference], context: int
    ) -> tuple[dict[str, Any], Sizes]:
        """See :func:`evaluate`."""
        scores, sizes = evaluate(runner, references)
        return scores.as_json(), sizes

    def line(self, cell: dict[str, Any]) -> str:
        """A cell in a line."""
        kl, top1, greedy, keys = (cell[name] for name in ("kl", "top1", "greedy", "passkeys"))
        return (
            f"{cell['method']}, {cell['context']} tokens: ratio {cell['ratio']:.2f}, "
            f"KL {kl['mean']:.5f} ({kl['low']:.5f} to {kl['high']:.5f}), "
            f"top-1 {top1['mean']:.4f}, greedy {greedy['mean']:.0f}, "
            f"pass keys {keys['mean']:.2f}; {cell['seconds']:.0f} s"
        )


def _release(references: list[Reference]) -> None:
    for reference in references:
        reference.release()


def cells(run: Run, methods: Sequence[Method]) -> list[tuple[Method, int]]:
    """What is measured, in order.

    Rivals come by context, whose dense caches they share; ours by method, which is compiled once.
    """
    rivals = [(m, context) for context in run.contexts for m in methods if not m.ours]
    return rivals + [(m, context) for m in methods if m.ours for context in run.contexts]


def unit_of(method: Method, context: int) -> str:
    """What one process measures as a whole: see :func:`cells`."""
    own = method.ours or method.alone
    return method.name if own else f"rivals, {context} tokens"


def measure(
    run: Run, methods: Sequence[Method], setting: Setting, results: Results, clock: Clock,
    claims: Claims, suite: Suite | None = None,
) -> bool:  # fmt: skip
    """Measure every cell that is not there yet and that nobody else measures, one line each.

    Args:
        run: what is measured.
        methods: of it.
        setting: what methods are started with.
        results: what there is; new cells are added.
        clock: says when to stop.
        claims: say what this process measures.
        suite: what methods are measured on; None: :class:`References`.

    Returns:
        False if time ran out first or a cell failed; both are said.
    """
    suite = suite or References(run, setting)
    todo = [(m, context) for m, context in cells(run, methods) if not results.has(m.name, context)]
    gone: set[str] = set()
    complete = True
    runner: Runner | None = None
    current = ""
    for number, (method, context) in enumerate(todo, start=1):
        if method.name in gone or not claims.take(unit_of(method, context)):
            continue
        if not clock.has_time():
            print("time is up: the same command again goes on", flush=True)
            return False
        started = time.monotonic()
        try:
            if runner is None or method.name != current:
                runner, current = None, ""
                _clean()
                runner, current = method.start(setting), method.name
            cell = _cell(method, runner, suite, context)
        except Unavailable as reason:
            print(f"{method.name}: left out: {reason}", flush=True)
            gone.add(method.name)
            continue
        except Exception:
            print(f"{method.name}, {context} tokens: FAILED", flush=True)
            traceback.print_exc()
            gone.add(method.name)
            complete = False
            continue
        cell["seconds"] = time.monotonic() - started
        clock.longest = max(clock.longest, cell["seconds"])
        results.add(cell)
        print(f"{number}/{len(todo)} {suite.line(cell)}", flush=True)
    return complete


def _clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _cell(method: Method, runner: Runner, suite: Suite, context: int) -> dict[str, Any]:
    scores, sizes = suite.score(runner, suite.at(context, not method.ours), context)
    return {
        "method": method.name,
        "family": method.family,
        "context": context,
        **asdict(sizes),
        **scores,
        **runner.notes(),
    }
