"""Measure cell after cell: every method of a run at every context length."""

from __future__ import annotations

import gc
import time
import traceback
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .documents import windows
from .evaluate import NEXT, Reference, evaluate
from .methods import Method
from .results import Results
from .runner import RivalRunner, Runner, Setting, Unavailable


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


class References:
    """The stock model's side of every context length, made when it is first needed."""

    def __init__(self, run: Run, setting: Setting) -> None:
        self.run = run
        self.subject = setting.subject
        length = max(run.contexts) + NEXT
        texts = windows(self.subject.tokenizer, "test", run.windows, length)
        self.texts: Tensor = texts.to(self.subject.device)  # [windows, length]
        self._made: dict[int, list[Reference]] = {}

    def at(self, context: int) -> list[Reference]:
        """One reference for each batch of windows."""
        if context not in self._made:
            self._made[context] = [
                Reference(self.subject, ids, context, self.run.greedy, number * self.run.batch)
                for number, ids in enumerate(self.texts[:, : context + NEXT].split(self.run.batch))
            ]
        return self._made[context]

    def release(self) -> None:
        """Let go of the dense caches; they are made again when they are needed again."""
        for reference in (r for made in self._made.values() for r in made):
            reference.release()


def measure(
    run: Run, methods: list[Method], setting: Setting, results: Results, clock: Clock
) -> bool:
    """Measure every cell that is not there yet, one line each.

    Returns:
        False if time ran out first or a cell failed; both are said.
    """
    references = References(run, setting)
    complete = True
    for number, method in enumerate(methods):
        runner: Runner | None = None
        for context in run.contexts:
            if results.has(method.name, context):
                continue
            if not clock.has_time():
                print("time is up: the same command again goes on", flush=True)
                return False
            started = time.monotonic()
            try:
                runner = runner or method.start(setting)
                if not isinstance(runner, RivalRunner):
                    references.release()
                cell = _cell(method, runner, references.at(context), context)
            except Unavailable as reason:
                print(f"{method.name}: left out: {reason}", flush=True)
                break
            except Exception:
                print(f"{method.name}, {context} tokens: FAILED", flush=True)
                traceback.print_exc()
                complete = False
                break
            cell["seconds"] = time.monotonic() - started
            clock.longest = max(clock.longest, cell["seconds"])
            results.add(cell)
            print(f"{number + 1}/{len(methods)} {line(cell)}", flush=True)
        del runner
        gc.collect()
    return complete


def _cell(
    method: Method, runner: Runner, references: list[Reference], context: int
) -> dict[str, Any]:
    scores, sizes = evaluate(runner, references)
    return {
        "method": method.name,
        "family": method.family,
        "context": context,
        **asdict(sizes),
        **scores.as_json(),
        **runner.notes(),
    }


def line(cell: dict[str, Any]) -> str:
    """A cell in a line."""
    kl, top1, greedy, keys = (cell[name] for name in ("kl", "top1", "greedy", "passkeys"))
    return (
        f"{cell['method']}, {cell['context']} tokens: ratio {cell['ratio']:.2f}, "
        f"KL {kl['mean']:.5f} ({kl['low']:.5f} to {kl['high']:.5f}), top-1 {top1['mean']:.4f}, "
        f"greedy {greedy['mean']:.0f}, pass keys {keys['mean']:.2f}; {cell['seconds']:.0f} s"
    )
