"""Products of attention written as einsum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from apack_compile.passes.einsum import scores_operands, sum_operands


def product(equation: str, *operands: Any) -> tuple[fx.Node, list[fx.Node]]:
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in "xy"]
    given = operands or tuple(inputs)
    return graph.call_function(torch.einsum, (equation, *given)), inputs


@pytest.mark.parametrize(
    ("equation", "order"),
    [("bhqd,bhkd->bhqk", (0, 1)), ("b h i d, b h j d -> b h i j", (0, 1)),
     ("...qd,...kd->...qk", (0, 1)), ("bhkd,bhqd->bhqk", (1, 0)), ("nhid,nhjd->nhij", (0, 1))],
)  # fmt: skip
def test_scores(equation: str, order: tuple[int, int]) -> None:
    node, inputs = product(equation)
    assert scores_operands(node) == tuple(inputs[i] for i in order)
    assert sum_operands(node) is None


@pytest.mark.parametrize(
    ("equation", "order"),
    [("bhqk,bhkd->bhqd", (0, 1)), ("bhkd,bhqk->bhqd", (1, 0)), ("...qk,...kd->...qd", (0, 1))],
)
def test_weighted_sums(equation: str, order: tuple[int, int]) -> None:
    node, inputs = product(equation)
    assert sum_operands(node) == tuple(inputs[i] for i in order)
    assert scores_operands(node) is None


@pytest.mark.parametrize(
    "equation",
    ["bqhd,bkhd->bhqk", "bhqd,bhkd->bhq", "bhqd,hkd->bhqk", "bhqd,bhkd", "bhqd,bhkd->bqhk",
     "bhqd,bhkd->bhkq", "bhqq,bhkq->bhqk"],
)  # fmt: skip
def test_other_products(equation: str) -> None:
    node, _ = product(equation)
    assert scores_operands(node) is None or equation == "bhqd,bhkd->bhkq"
    assert sum_operands(node) is None


def test_what_is_taken_for_attention_gives_its_numbers() -> None:
    """``bhqd,bhkd->bhkq`` is products of keys and queries the other way round, by its letters."""
    x, y = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5)
    node, inputs = product("bhqd,bhkd->bhkq")
    found = scores_operands(node)
    assert found == (inputs[1], inputs[0])

    def canonical(q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT

    torch.testing.assert_close(torch.einsum("bhqd,bhkd->bhkq", x, y), canonical(y, x))


def test_operands_in_a_list_and_other_functions() -> None:
    node, inputs = product("bhqd,bhkd->bhqk")
    listed = node.graph.call_function(torch.einsum, ("bhqd,bhkd->bhqk", inputs))
    assert scores_operands(listed) == tuple(inputs)
    assert scores_operands(node.graph.call_function(torch.matmul, tuple(inputs))) is None
    alone = node.graph.call_function(torch.einsum, ("bhqd->bhdq", inputs[0]))
    assert scores_operands(alone) is None
