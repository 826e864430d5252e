"""Compiled calls of models for as long as one thread generates with them.

A module has one compiled call, whoever calls it. While ``generate`` of a compiled object runs, the
models inside of it call by way of :func:`_by_thread`: in the thread that generates, what belongs to
that compiled object; in any other, what they would have called anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from .locks import lock

Calls = Mapping[nn.Module, Callable[..., Any]]

_CALLS: ContextVar[Calls] = ContextVar("apack_calls", default=MappingProxyType({}))


@dataclass
class _Installed:
    """A model that calls by thread.

    Attributes:
        before: its compiled call.
        users: how many ``generate`` run.
    """

    before: Callable[..., Any] | None
    users: int = 0


_INSTALLED: dict[nn.Module, _Installed] = {}
_LOCK = lock()


@contextmanager
def compiled_calls(calls: Calls) -> Iterator[None]:
    """Let models call these instead, in this thread."""
    with _LOCK:
        for model in calls:
            _install(model)
    token = _CALLS.set({**_CALLS.get(), **calls})
    try:
        yield
    finally:
        _CALLS.reset(token)
        with _LOCK:
            for model in calls:
                _remove(model)


def _install(model: nn.Module) -> None:
    if model not in _INSTALLED:
        before = model._compiled_call_impl
        _INSTALLED[model] = _Installed(before)
        model._compiled_call_impl = _by_thread(model, before)
    _INSTALLED[model].users += 1


def _remove(model: nn.Module) -> None:
    installed = _INSTALLED[model]
    installed.users -= 1
    if not installed.users:
        del _INSTALLED[model]
        model._compiled_call_impl = installed.before


def _by_thread(model: nn.Module, before: Callable[..., Any] | None) -> Callable[..., Any]:
    otherwise = before or model._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # part of a larger graph
            return otherwise(*args, **kwargs)
        return _CALLS.get().get(model, otherwise)(*args, **kwargs)

    return call
