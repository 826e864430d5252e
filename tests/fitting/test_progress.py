from __future__ import annotations

import io
import logging

import pytest

from apack_compile.fitting import progress as module
from apack_compile.fitting.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.setattr(module, "EVERY", 0.01)


def wait_for(stream: io.StringIO, text: str) -> None:
    for _ in range(2000):
        if text in stream.getvalue():
            return
        module.time.sleep(0.005)
    raise AssertionError(f"{text!r} not in {stream.getvalue()!r}")


@pytest.mark.usefixtures("_impatient")
def test_a_terminal_shows_a_line_that_moves_and_is_wiped() -> None:
    stream = Terminal()
    with Progress("fitting", stream=stream) as progress:
        progress.step("batch 1")
        wait_for(stream, "\rattentionpack: fitting: batch 1 (0 s)\x1b[K")
        progress.step("batch 2")
        wait_for(stream, "batch 2")
    assert stream.getvalue().endswith("\r\x1b[K")
    assert "\n" not in stream.getvalue()


def test_what_takes_less_than_a_second_shows_nothing() -> None:
    stream = Terminal()
    with Progress("fitting", stream=stream) as progress:
        progress.step("batch 1")
    assert stream.getvalue() == ""


@pytest.mark.usefixtures("_impatient")
def test_elsewhere_nothing_is_written_and_steps_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream = io.StringIO()
    with caplog.at_level(logging.INFO), Progress("fitting", stream=stream) as progress:
        progress.step("batch 1")
    assert stream.getvalue() == ""
    first, last = (r.getMessage() for r in caplog.records)
    assert first == "fitting: batch 1 (0 s)" and last.startswith("fitting: done after 0.")


@pytest.mark.usefixtures("_impatient")
def test_show_overrules_what_the_stream_is() -> None:
    shown, hidden = io.StringIO(), Terminal()
    with Progress("fitting", True, shown) as progress:
        progress.step("batch 1")
        wait_for(shown, "batch 1")
    with Progress("fitting", False, hidden) as progress:
        progress.step("batch 1")
    assert hidden.getvalue() == ""


@pytest.mark.usefixtures("_impatient")
def test_an_error_wipes_the_line_and_is_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    stream = Terminal()
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(KeyError),
        Progress("fitting", stream=stream) as progress,
    ):
        progress.step("batch 1")
        wait_for(stream, "batch 1")
        raise KeyError
    assert stream.getvalue().endswith("\r\x1b[K")
    assert caplog.messages[-1].startswith("fitting: failed after")


def test_no_standard_error_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    with Progress("fitting") as progress:
        progress.step("batch 1")
    assert not progress.drawn
