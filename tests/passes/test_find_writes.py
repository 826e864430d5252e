from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from apack_compile.passes.find_writes import is_written, written


@torch.library.custom_op("apack_tests::shift", mutates_args=("x",))
def shift(y: Tensor, x: Tensor) -> None:
    """Writes to its second argument."""
    x += y


def first_input(fn: Callable[..., Any]) -> fx.Node:
    graph = fx.symbolic_trace(fn).graph
    return next(n for n in graph.nodes if n.op == "placeholder")


WRITES: dict[str, Callable[[Any], Any]] = {
    "a method": lambda x: x.mul_(2),
    "an out argument": lambda x: torch.add(x, 1, out=x),
    "a view by method": lambda x: x.transpose(1, 2).narrow(2, 0, 1).zero_(),
    # Bug: these were not seen, and what they wrote was lost.
    "a view by function": lambda x: torch.narrow(x, 2, 0, 1).zero_(),
    "a view of a view by function": lambda x: torch.select(torch.transpose(x, 1, 2), 1, 0).fill_(1),
    "one of several views": lambda x: torch.chunk(x, 2, 1)[0].zero_(),
    "a cast that does nothing": lambda x: x.to(torch.float32).zero_(),
    "an attribute": lambda x: x.mT.zero_(),
    "an overload": lambda x: torch.ops.aten.add_.Tensor(x, x),
    "an overload packet": lambda x: torch.ops.aten.copy_(x, x),
    "a view by an overload": lambda x: torch.ops.aten.slice.Tensor(x, 2, 0, 1).zero_(),
    "an operator of the user's": lambda x: torch.ops.apack_tests.shift(x + 1, x),
    "the same by name": lambda x: torch.ops.apack_tests.shift(y=x + 1, x=x),
    "a function in place": lambda x: F.relu(x, inplace=True),
}


@pytest.mark.parametrize("how", WRITES)
def test_what_is_written_to_is_found(how: str) -> None:
    assert is_written(first_input(WRITES[how]))


READS: dict[str, Callable[[Any], Any]] = {
    "a copy": lambda x: (x + 1).mul_(2),
    "another argument": lambda x: torch.ops.apack_tests.shift(x, x + 1),
    "out of something else": lambda x: torch.add(x, 1, out=x.new_empty(2)),
    "not in place": lambda x: F.relu(x, inplace=False),
    "a special method": lambda x: x.__add__(1),
    "a view that is read": lambda x: torch.narrow(x, 2, 0, 1).exp(),
}


@pytest.mark.parametrize("how", READS)
def test_what_is_only_read_is_not(how: str) -> None:
    assert not is_written(first_input(READS[how]))


@pytest.mark.parametrize("target", [operator.iadd, operator.setitem])
def test_statements_that_write_are_found(target: Any) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert written(graph.call_function(target, (x, 0, 1)[: 2 + (target is operator.setitem)])) == [
        x
    ]


def test_a_kernel_of_the_users_may_write_to_any_of_its_arguments() -> None:
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    kernel = torch._higher_order_ops.triton_kernel_wrap.triton_kernel_wrapper_mutation
    call = graph.call_function(kernel, (), {"kernel_idx": 0, "kwargs": {"x": a, "y": b}})
    assert set(written(call)) == {a, b}
