"""Models that generate call compiled code, in the thread that generates and nowhere else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from apack_compile.calls import compiled_calls


class Model(nn.Module):
    def forward(self) -> str:
        return "plain"


def says(what: str) -> Callable[..., str]:
    return lambda: what


def in_thread(run: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


def test_another_thread_calls_the_model_as_it_is() -> None:
    """Bug: the compiled call was everybody's while one thread generated."""
    model = Model()
    with compiled_calls({model: says("ours")}):
        assert model() == "ours"
        assert in_thread(model) == "plain"
    assert model() == "plain" and model._compiled_call_impl is None


def test_two_threads_that_generate_have_their_own_calls_whoever_ends_first() -> None:
    """Bug: who ended first took the other's call away; who ended last left one behind."""
    model, begun, ended = Model(), threading.Event(), threading.Event()
    found = []

    def first() -> None:
        with compiled_calls({model: says("first")}):
            begun.set()
            ended.wait()
            found.append(model())

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    with compiled_calls({model: says("second")}):
        found.append(model())
    assert model() == "plain"
    ended.set()
    thread.join()
    assert found == ["second", "first"]
    assert model._compiled_call_impl is None


def test_a_call_that_was_there_before_comes_back() -> None:
    model = Model()
    model._compiled_call_impl = before = says("compiled by the user")
    with pytest.raises(ValueError, match="in generate"), compiled_calls({model: says("ours")}):
        assert (model(), in_thread(model)) == ("ours", "compiled by the user")
        raise ValueError("in generate")
    assert model._compiled_call_impl is before


def test_generate_within_generate() -> None:
    outer, inner = Model(), Model()
    with compiled_calls({outer: says("outer"), inner: says("outer's")}):
        with compiled_calls({inner: says("inner")}):
            assert (outer(), inner()) == ("outer", "inner")
        assert (outer(), inner()) == ("outer", "outer's")


def test_another_threads_compilation_does_not_make_calls_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bug: torch.compiler.is_compiling() is true in all threads; decode ran eagerly meanwhile."""
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    model = Model()
    with compiled_calls({model: says("ours")}):
        assert torch.compiler.is_compiling()
        assert model() == "ours"
