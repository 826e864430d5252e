"""Locks that a forked process finds free.

The threads that held them are not there to let go of them. What such a lock guards is left whole at
every step, or made anew: a child may find less compiled or learnt than its parent has.
"""

from __future__ import annotations

import os
import threading
from typing import Any
from weakref import WeakSet

_LOCKS: WeakSet[Any] = WeakSet()


def lock() -> threading.Lock:
    """A lock."""
    made = threading.Lock()
    _LOCKS.add(made)
    return made


def reentrant_lock() -> Any:
    """A lock that its thread may take again."""
    made = threading.RLock()
    _LOCKS.add(made)
    return made


def _free_all() -> None:
    for each in tuple(_LOCKS):
        each._at_fork_reinit()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_free_all)
