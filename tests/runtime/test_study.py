"""What trials are told of the two kinds of work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apack_compile.codec.sensitivity import Sensitivity
from apack_compile.fitting.layer import Lesson
from apack_compile.options import Options
from apack_compile.runtime import study
from apack_compile.runtime.calibrate import Trial
from apack_compile.runtime.sense import Measured

from .. import zoo
from ..passes.capture import capture


def test_trials_are_of_the_prompts_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: one layer coded alone hardly hurts recall, so that trials took its weight away."""
    given: list[Any] = []

    def calibrate(*args: Any) -> list[tuple[Trial, Trial]]:
        given.append(args[6])
        return []

    monkeypatch.setattr(study, "calibrate", calibrate)
    seen = capture(zoo.plain_decoder(), torch.arange(60)[None], torch.arange(60)[None])
    studies = study.Studies(seen.gm, seen.plan, Options(), lambda *_: ())
    monkeypatch.setattr(studies, "_coded", lambda *_: torch.ones(1, 60, dtype=torch.bool))
    one = torch.eye(4, dtype=torch.float64)[None]
    prose, recall = [Sensitivity(one, one)], [Sensitivity(2 * one, 2 * one)]
    lesson = Lesson((), None, None, (4, 4), 60)
    prefill = study.Study(None, [], (lesson,) * len(seen.plan.sites))  # type: ignore[arg-type]
    studies.calibrate((), prefill, Measured(prose, recall), [], lambda done, of: None)
    assert given == [prose]
