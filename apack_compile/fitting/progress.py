"""A line on standard error that shows how far long work is; log records where nobody watches."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

log = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds before anything is shown."""

EVERY = 0.5
"""Seconds between two drawings of the line."""


class Progress:
    """Use as a context; :meth:`step` says what is being done.

    On a terminal the line is drawn anew by a thread, so that it moves while a step takes long, and
    wiped when all is done. Elsewhere steps that begin later than after ``PATIENCE`` are logged.

    Args:
        what: the work.
        show: draw the line; None: if ``stream`` is a terminal.
        stream: None: standard error.
    """

    def __init__(self, what: str, show: bool | None = None, stream: TextIO | None = None) -> None:
        self.what = what
        self.stream = sys.stderr if stream is None else stream
        # Programs without a console have no standard error.
        there = self.stream is not None
        self.drawn = there and (self.stream.isatty() if show is None else show)
        self._step = ""
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        self.started = time.monotonic()
        if self.drawn:
            self._thread = threading.Thread(target=self._draw, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        log.info("%s: %s after %.1f s", self.what, "done" if error is None else "failed",
                 self.seconds)  # fmt: skip

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def step(self, text: str) -> None:
        """What is being done from now on."""
        self._step = text
        if not self.drawn and self.seconds >= PATIENCE:
            log.info("%s: %s (%.0f s)", self.what, text, self.seconds)

    def _draw(self) -> None:
        if self._done.wait(PATIENCE):
            return
        while True:
            self._write(f"\rattentionpack: {self.what}: {self._step} ({self.seconds:.0f} s)\x1b[K")
            if self._done.wait(EVERY):
                break
        self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
