"""What becomes of a family, measured: its sites, its tokens with exact codes, its error with codes.

``python -m tests.families.measure [name ...]`` prints it, of all families unless some are named.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import CompileConfig

import apack_compile
from apack_compile.codec import TransformLayout
from apack_compile.report import Report

from .. import zoo
from . import registry
from .registry import FAMILIES, Decoded

STEPS = 16

OPTIONS: dict[str, Any] = dict(
    ratio=8, inner="eager", window=8, block=16, profile_cache=False, fit_tokens=120
)
"""One prompt has fewer tokens, and is packed exactly; the second brings enough for a fit."""


@dataclass(frozen=True)
class Measured:
    """What became of a family.

    Attributes:
        packed: sites that attend to packed caches, in the graphs that decode.
        left: sites left alone there, by reason.
        first: the first step that attends to packed caches.
        same: whether tokens with exact codes are those of the model without packing.
        off: largest difference of the logits then.
        error: of the logits of that step with ratio 8, relative to what tells them apart.
        spoilt: the same, at least, when codes are lost, or components mixed up.
    """

    packed: int
    left: Mapping[str, int]
    first: int
    same: bool
    off: float
    error: float = 0.0
    spoilt: float = 0.0


class Subject:
    """A model of a family.

    Args:
        name: the family.
        prefill: compile it as well, not decode steps alone.
    """

    def __init__(self, name: str, prefill: bool) -> None:
        self.decode = FAMILIES[name].decode
        self.case = registry.make(name)
        self.model, self.settings = self.case.model, {}
        if prefill:
            self.model = torch.compile(self.case.model, backend="attentionpack", options=OPTIONS)
        else:
            config = CompileConfig(backend="attentionpack", mode=None, options=OPTIONS)
            self.settings = {"compile_config": config}

    def uncompiled(self) -> Decoded:
        """What the model gives as it is."""
        return self.decode(self.case.model, inputs(self.case), STEPS)

    def by_torch(self) -> Decoded:
        """What torch's own eager backend gives: for most families that is the same."""
        self.case.model.compile(backend="eager")
        want = self.uncompiled()
        self.case.model._compiled_call_impl = None
        torch._dynamo.reset()
        return want

    def packed(self, steps: int) -> Decoded:
        """What it gives with packed caches."""
        return self.decode(self.model, {**inputs(self.case), **self.settings}, steps)

    def report(self) -> Report:
        """Of what was packed until now."""
        return apack_compile.report(self.case.model)


def inputs(case: zoo.Case) -> dict[str, Any]:
    """A copy, for some models write to theirs."""
    return {key: value.clone() for key, value in case.inputs.items()}


def measure(name: str, prefill: bool, differs_uncompiled: bool = False) -> Measured:
    """Run a family a few times."""
    subject = Subject(name, prefill)
    want = subject.by_torch() if differs_uncompiled and prefill else subject.uncompiled()
    got = subject.packed(STEPS)
    report = subject.report()
    packed, left = sites(report)
    same = torch.equal(got.tokens, want.tokens)
    off = max(float((a - b).abs().max()) for a, b in zip(got.logits, want.logits, strict=True))
    if not packed:
        return Measured(0, left, 0, same, off)
    first = STEPS - report.attends // packed
    assert report.attends == packed * (STEPS - first), "every site attends at every step"

    def error() -> float:
        return distance(subject.packed(first + 1).logits[first], want.logits[first])

    coded = error()
    assert subject.report().attends == report.attends + packed
    worse = []
    for change in (torch.zeros_like, lambda codes: codes.roll(1, -1)):
        with spoilt(change):
            worse.append(error())
    return Measured(packed, left, first, same, off, coded, min(worse))


def sites(report: Report) -> tuple[int, dict[str, int]]:
    """What became of attention in the graphs that decode: those that run again and again."""
    often = [g for g in report.graph_reports if sum(n for _, n in g.runs) >= STEPS // 2]
    left = Counter(skip.reason for graph in often for skip in graph.skipped)
    return sum(len(graph.packed) for graph in often), dict(left)


def distance(got: Tensor, want: Tensor) -> float:
    """Error of logits, relative to what tells them apart; some are ruled out by a huge number."""
    seen = want > -1e30
    got, want = got[seen], want[seen]
    return float((got - want).norm() / (want - want.mean()).norm())


@contextmanager
def spoilt(change: Any) -> Iterator[None]:
    """What is coded is changed behind the code's back."""
    encode = TransformLayout.encode_and_judge

    def worse(self: TransformLayout, *args: Any) -> Any:
        (codes, *gains), judged = encode(self, *args)
        return [change(codes), *gains], judged

    with mock.patch.object(TransformLayout, "encode_and_judge", worse):
        yield


def main() -> None:
    """Measure the families that are named."""
    with torch.no_grad():
        for name in sys.argv[1:] or FAMILIES:
            torch._dynamo.reset()
            print(name, measure(name, True), flush=True)


if __name__ == "__main__":
    main()
