"""Locks in a forked process."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from apack_compile.locks import lock, reentrant_lock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize("make", [lock, reentrant_lock])
def test_a_child_finds_free_what_a_thread_of_its_parent_held(make: Any) -> None:
    mine, held, go = make(), threading.Event(), threading.Event()

    def hold() -> None:
        with mine:
            held.set()
            go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if mine.acquire(timeout=5) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not mine.acquire(blocking=False), "the parent's is still held"
    go.set()
    thread.join()
    assert mine.acquire(timeout=5)
    mine.release()
