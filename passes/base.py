"""What all passes share: their report, and how to read a node of a Dynamo graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

MATMUL = ("matmul", "__matmul__", torch.matmul, operator.matmul)
"""Products of matrices, however they are called."""


@dataclass(frozen=True)
class Skip:
    """Something a pass looked at and left alone.

    Attributes:
        where: the node's name.
        reason: why, in words for a user.
    """

    where: str
    reason: str


@dataclass(frozen=True)
class PassReport:
    """What one pass did to one graph.

    Attributes:
        name: the pass.
        matched: sites it acted on.
        skipped: sites it left alone, and why.
    """

    name: str
    matched: int
    skipped: tuple[Skip, ...] = ()


def value_of(node: Any) -> Any:
    """The example value that Dynamo gave a node, or the argument itself if it is no node."""
    if isinstance(node, fx.Node):
        return node.meta.get("example_value", node.meta.get("val"))
    return node


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """Sizes (ints, or SymInts where they vary) of a node that is a tensor, else None."""
    value = value_of(node)
    return tuple(map(settled, value.shape)) if isinstance(value, torch.Tensor) else None


def settled(size: Any) -> Any:
    """A size; an int if it is a symbol that a guard holds to one value."""
    known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    return size if known is None else known


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are provably equal, without adding a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, wherever it stands."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def calls(node: Any, *targets: Any) -> bool:
    """Whether ``node`` calls one of ``targets``: functions, or names of tensor methods."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    return node.target in targets


def output_of(graph: fx.Graph) -> fx.Node:
    """The graph's output node."""
    return next(n for n in reversed(graph.nodes) if n.op == "output")


def attribute(gm: fx.GraphModule, target: str) -> Any:
    """What a ``get_attr`` node with this target stands for."""
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    return value
