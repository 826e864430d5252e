"""Trials of both kinds of work, put together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apack_compile.codec.sensitivity import Sensitivity
from apack_compile.options import Options
from apack_compile.runtime import study
from apack_compile.runtime.calibrate import Trial
from apack_compile.runtime.sense import RECALL, Measured

from .. import zoo
from ..passes.capture import capture


def layer(size: float) -> Sensitivity:
    one = torch.eye(4, dtype=torch.float64)[None] * size / 8
    return Sensitivity(one, one)


@pytest.mark.parametrize("recall", [4.0, 0.0])
def test_trials_count_recall_by_its_share(recall: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: scaling by what prose alone shows took back what recall had brought."""
    asked: list[bool] = []
    steps: list[tuple[int, int]] = []

    def calibrate(*args: Any) -> list[tuple[Trial, Trial]]:
        *_, step, repeats = args
        asked.append(repeats)
        step(2, 2)
        scale = 10.0 if repeats else 1.0
        return [(Trial(1.0 * scale, 2.0 * scale), Trial(3.0 * scale, 4.0 * scale))]

    monkeypatch.setattr(study, "calibrate", calibrate)
    seen = capture(zoo.plain_decoder(), torch.arange(60)[None], torch.arange(60)[None])
    studies = study.Studies(seen.gm, seen.plan, Options(), lambda *_: ())
    monkeypatch.setattr(studies, "_coded", lambda *_: torch.ones(1, 60, dtype=torch.bool))
    prefill = study.Study(None, [], ())  # type: ignore[arg-type]
    measured = Measured([layer(2.0)], [layer(recall)])
    ((k, v),) = studies.calibrate((), prefill, measured, [], lambda *s: steps.append(s))
    share = RECALL * 2.0 / recall if recall else 0.0
    assert k == Trial(1.0 + share * 10, 2.0 + share * 20)
    assert v == Trial(3.0 + share * 30, 4.0 + share * 40)
    assert asked == ([False, True] if recall else [False])
    assert steps[-1] == ((4, 4) if recall else (2, 2))
