"""When a step is captured, and whose memory its results are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from apack_compile.lower.capture import LARGE, LATEST, MOST, RARELY, Captured

from .fakes import FakeRecording


class Step:
    """``ring += x`` in place; returns ``w * x`` and the sum of the ring."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, w: Tensor, ring: Tensor, x: Tensor, n: int) -> tuple[Any, ...]:
        self.runs += 1
        ring += x.sum()
        return w * x + n, ring.sum(), n


def captured(step: Any = None, sparing: bool = True) -> Captured:
    return Captured(step or Step(), frozenset({1}), FakeRecording, sparing)


def arguments(n: int = 0) -> list[Any]:
    return [torch.nn.Parameter(torch.randn(3)), torch.zeros(4), torch.randn(3), n]


def expected(args: list[Any]) -> tuple[Any, ...]:
    w, ring, x, n = args
    return w * x + n, (ring + x.sum()).sum(), n


def check(call: Captured, args: list[Any]) -> list[Any]:
    wanted = expected(args)
    got = call(args)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine == theirs if isinstance(mine, int) else torch.equal(mine, theirs)
    return got


def test_the_second_call_captures_and_the_third_replays() -> None:
    step, args = Step(), arguments()
    call = captured(step)
    for _ in range(6):
        args[2] = torch.randn(3)
        check(call, args)
    assert call.captures == 1


def test_results_of_a_replay_are_not_overwritten_by_the_next() -> None:
    call, args = captured(), arguments()
    for _ in range(2):
        check(call, args)
    kept = [(got, [t.clone() for t in got[:2]]) for got in (check(call, args) for _ in range(4))]
    for got, copies in kept:
        assert all(torch.equal(a, b) for a, b in zip(got, copies, strict=False))


def test_inputs_are_read_when_they_are_given_and_never_written() -> None:
    call, args = captured(), arguments()
    for _ in range(4):
        check(call, args)
    x = torch.randn(3)
    before = x.clone()
    args[2] = x
    got = check(call, args)
    x.fill_(7.0)
    check(call, args)
    assert torch.equal(got[0], args[0] * before)


@pytest.mark.parametrize("what", ["ring", "weight", "number", "shape"])
def test_what_a_recording_depends_on(what: str) -> None:
    call, args = captured(), arguments()
    for _ in range(3):
        check(call, args)
    other = list(args)
    if what == "ring":
        other[1] = torch.zeros(4)
    elif what == "weight":
        other[0] = torch.nn.Parameter(torch.randn(3))
    elif what == "number":
        other[3] = 5
    else:
        other[2] = torch.randn(1)
    check(call, other)
    assert call.captures == 1, "captured at once"
    for _ in range(3):
        check(call, other)
        check(call, args)
    assert call.captures == 2


def test_strides_of_inputs_are_kept() -> None:
    call = Captured(lambda x, y: (x.stride(), x + y), frozenset(), FakeRecording)
    for shape, strides in [((2, 3), (1, 2)), ((2, 3), (0, 1)), ((2, 3), (8, 2)), ((1, 3), (0, 1))]:
        base = torch.randn(20)
        for _ in range(4):
            x, y = base.as_strided(shape, strides), torch.randn(3)
            got = call([x, y])
            assert got[0] == strides and torch.equal(got[1], x + y)
    assert call.captures == 4


def test_the_stride_of_a_dimension_of_size_one_does_not_matter() -> None:
    """Bug: a column of a mask that grows was captured anew at each step."""
    call = Captured(lambda x, y: (x + y,), frozenset(), FakeRecording)
    for length in range(40, 46):
        x = torch.randn(1, length)[:, -1:]
        assert torch.equal(call([x, torch.ones(1)])[0], x + 1)
    assert call.captures == 1


def test_calls_in_and_out_of_inference_mode() -> None:
    call, args = captured(), arguments()
    for n in range(8):
        with torch.inference_mode(n < 4):
            args[2] = torch.randn(3)
            check(call, args)
    assert call.captures == 1


def test_large_inputs_are_not_copied() -> None:
    big = torch.zeros(LARGE // 4 + 1)
    call = Captured(lambda x: (x[:2] + 1,), frozenset(), FakeRecording)
    for value in range(4):
        big[0] = value
        assert call([big])[0][0] == value + 1
    (recording,) = call._recordings.values()
    assert recording.inputs == []


def test_whatever_is_new_is_captured_where_a_call_takes_as_long() -> None:
    step, args = Step(), arguments()
    call = captured(step, sparing=False)
    rings = [torch.zeros(4) for _ in range(10)]
    for number, ring in enumerate(rings):
        args[1] = ring
        for _ in range(3):
            check(call, args)
            assert call.captures == number + (call.calls > 1)
    assert len(call._recordings) == LATEST


def test_where_such_a_capture_fails_it_is_tried_once_more_when_the_call_has_run() -> None:
    class Fails(FakeRecording):
        tries = 0

        def record(self, run: Any) -> list[Any]:
            Fails.tries += 1
            if Fails.tries == 1:
                raise RuntimeError("not warm")
            return super().record(run)

    call, args = Captured(Step(), frozenset({1}), Fails, False), arguments()
    for _ in range(5):
        check(call, args)
    assert not call.reason and Fails.tries == 2 and len(call._recordings) == 1


def test_few_recordings_are_kept_and_captures_are_rare() -> None:
    call = captured()
    rings = [torch.zeros(4) for _ in range(30)]
    args = arguments()
    for ring in rings:
        for _ in range(3):
            args[1] = ring
            check(call, args)
    assert len(call._recordings) <= MOST
    assert call.captures <= len(rings) * 3 // RARELY + MOST + 1


def test_a_capture_that_fails_is_not_tried_again_and_the_step_is_taken(caplog: Any) -> None:
    class Broken(FakeRecording):
        def record(self, run: Any) -> list[Any]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    call, args = Captured(Step(), frozenset({1}), Broken), arguments()
    for _ in range(5):
        check(call, args)
    assert call.captures == 1 and call.reason.startswith("operation not permitted")
    assert len(caplog.records) == 1 and "no CUDA graph" in caplog.text


def test_an_exception_of_a_step_reaches_the_caller_and_leaves_all_as_it_was() -> None:
    def step(w: Tensor, ring: Tensor, x: Tensor, n: int) -> Any:
        if n:
            raise ValueError("from the model")
        return Step()(w, ring, x, n)

    call, args = captured(step), arguments()
    for _ in range(3):
        check(call, args)
    for _ in range(2):
        with pytest.raises(ValueError, match="from the model"):
            call([*args[:3], 1])
    check(call, args)


def test_inputs_on_several_devices_are_not_captured() -> None:
    call = Captured(lambda x, y: (x + 1,), frozenset(), FakeRecording)
    for _ in range(4):
        call([torch.zeros(2), torch.zeros(2, device="meta")])
    assert call.captures == 0 and "several devices" in call.reason
