from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from apack_compile.codec import ExactLayout, TransformLayout
from apack_compile.codec.moments import Moments
from apack_compile.codec.rotation import Turn
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
    # Bug: every prompt after that ran uncompiled to fail again, and nothing was said.
    assert profile.serves(10_000, visual=True)
    assert profile.reason.startswith("no: codes of an earlier fit are kept")


def turned_lesson(seed: int, counted: bool, tokens: int = 600) -> Lesson:
    """A prompt with rotary keys: positions as a count gives them, or as images have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, HEADS, tokens, DIM, generator=generator) * torch.linspace(3, 0.1, DIM)
    positions = torch.arange(tokens).float()
    if not counted:
        positions = positions.where(positions < 100, (positions - 100) // 20 + 100)
    angles = positions[:, None] * 10.0 ** (-torch.arange(DIM // 2) / 4)  # [T, D / 2]
    cos, sin = angles.cos().repeat(1, 2)[None], angles.sin().repeat(1, 2)[None]
    turn = Turn.of(cos, sin, False, tokens)
    sums = Moments.of(x.repeat_interleave(2, 1), x, x, None).tensors()
    return Lesson(sums, turn, None, (DIM, DIM), tokens if counted else 10_000)


@pytest.mark.parametrize("counted", [True, False])
def test_another_way_to_code_keys_has_another_layout(counted: bool) -> None:
    """Bug: codes fitted before rotation kept a layout that rotates, fitted after it, and back."""
    options = Options(ratio=4.0, k_code="pre-rope")
    profile = taught(turned_lesson(0, counted), options=options)
    assert profile.codes is not None
    assert profile.codes[0].layout.positional is counted
    profile.fit = replace(profile.fit, reach=1)  # so that the next prompt is beyond it
    learn([profile], [turned_lesson(1, not counted)], options, lambda: "not in this test")
    assert profile.codes[0].layout.positional is not counted
    assert ("as attention sees them" in profile.reason) is counted


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
