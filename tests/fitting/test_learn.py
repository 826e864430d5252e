from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apack_compile.codec import ExactLayout, TransformLayout
from apack_compile.codec.moments import Moments
from apack_compile.fitting import learn as module
from apack_compile.fitting.layer import FEWEST, LayerProfile, Lesson
from apack_compile.fitting.learn import learn
from apack_compile.options import Options

HEADS, DIM = 2, 16
OPTIONS = Options(ratio=4.0)


def lesson(x: Tensor, length: int | None = None) -> Lesson:
    """What a prefill with these keys and values would tell."""
    sums = Moments.of(x.repeat_interleave(2, 1), x, x, None).tensors()
    return Lesson(sums, None, None, (DIM, DIM), length or x.shape[2])


def taught(*lessons: Lesson, options: Options = OPTIONS) -> LayerProfile:
    profile = LayerProfile()
    for each in lessons:
        learn([profile], [each], options, lambda: "not in this test")
    return profile


def prose(tokens: int) -> Tensor:
    return torch.randn(1, HEADS, tokens, DIM)


def error(profile: LayerProfile, x: Tensor) -> float:
    assert profile.codes is not None
    code = profile.codes[1].code
    back = code.layout.decode(code.layout.encode(x, code.params), code.params, x.dtype)
    return float((back - x).square().sum() / x.square().sum())


def test_a_fit_waits_for_enough_tokens_over_several_prompts() -> None:
    profile = taught(lesson(prose(100)))
    assert profile.codes is None and "100 of 128 tokens" in profile.reason
    learn([profile], [lesson(prose(100))], OPTIONS, lambda: "not in this test")
    assert profile.codes is not None and profile.fit is not None and profile.fit.tokens == 200


def test_a_prompt_beyond_the_reach_with_few_tokens_does_not_replace_good_codes() -> None:
    """Bug: 4,100 tokens of padding and 20 words gave codes with an error of 56,070."""
    profile = taught(lesson(prose(600)))
    before = profile.codes
    learn([profile], [lesson(prose(20), length=5000)], OPTIONS, lambda: "not in this test")
    assert profile.codes is before
    assert "contexts of up to 768 tokens; 20 of 128 tokens" in profile.reason
    learn([profile], [lesson(prose(200), length=5000)], OPTIONS, lambda: "not in this test")
    assert profile.codes is not before and profile.reason.startswith("sensitivity not measured")
    assert error(profile, prose(500)) < 0.2


def test_however_few_tokens_the_option_asks_for_a_fit_wants_some() -> None:
    """Bug: fit_tokens=1 fitted codes on a handful of tokens."""
    few = Options(ratio=4.0, fit_tokens=1)
    assert taught(lesson(prose(FEWEST - 1)), options=few).codes is None
    assert taught(lesson(prose(FEWEST)), options=few).codes is not None


def test_prompts_that_are_not_finite_teach_nothing() -> None:
    """Bug: a prompt of NaN made all codes of the process NaN."""
    profile = taught(lesson(prose(600)), lesson(torch.full((1, HEADS, 2000, DIM), float("nan"))))
    assert error(profile, prose(500)) < 0.2


def test_codes_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = LayerProfile()
    broken = lesson(prose(600))
    broken.sums[2][0, 0, 0] = float("inf")
    learn([profile], [broken], OPTIONS, lambda: "not in this test")
    assert profile.codes is not None
    assert profile.codes[0].layout == ExactLayout(HEADS, DIM)
    assert profile.reason.endswith("packed exactly")


def test_a_failure_keeps_the_codes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = taught(lesson(prose(600)))
    before = profile.codes

    def fails(*_: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr(module, "fit_transform", fails)
    learn([profile], [lesson(prose(900))], OPTIONS, lambda: "not in this test")
    assert profile.codes is before and isinstance(profile.codes[0].layout, TransformLayout)


def test_memory_that_runs_out_is_another_try_at_the_next_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bug: one full device made the layers exact for the rest of the process."""
    profile, real = LayerProfile(), module.fit_transform

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(module, "fit_transform", fails)
    learn([profile], [lesson(prose(600))], OPTIONS, lambda: "not in this test")
    assert profile.codes is None
    monkeypatch.setattr(module, "fit_transform", real)
    learn([profile], [lesson(prose(600))], OPTIONS, lambda: "not in this test")
    assert profile.codes is not None
    assert isinstance(profile.codes[0].layout, TransformLayout)
