"""A decode graph in two: what depends on the length of the sequence, and all the rest.

    head    positions, masks, their bias: what has a shape or integers that move in every step
    body    the layers: always the same shapes and addresses, so that a CUDA graph can hold it

The head runs first and hands tensors of fixed shape to the body. Capacities of payloads are the
body's: they change only when a cache grows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.find_writes import written
from .values import is_mapped, symbols

ATTENDS = (torch.ops.apack.attend.default, torch.ops.apack.attend_with_bias.default)
APPEND = torch.ops.apack.append_.default
UPDATE = torch.ops.apack.update_importance_.default

Place = tuple[str, Any]
"""A value: ``("args", i)``, ``("head", i)``, ``("body", i)`` or ``("constant", value)``."""


class Inseparable(Exception):
    """Why a graph cannot be split."""


@dataclass(frozen=True)
class Halves:
    """The two graphs and how values pass between them.

    Attributes:
        head, body: the graphs; each returns a tuple.
        head_inputs, body_inputs: arguments of the whole graph, or results of the head.
        outputs: results of the whole graph.
        head_fakes, body_fakes: values of the inputs.
        storage: which inputs of the body are tensors of packed caches.
    """

    head: fx.GraphModule
    body: fx.GraphModule
    head_inputs: tuple[Place, ...]
    body_inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    head_fakes: tuple[Any, ...]
    body_fakes: tuple[Any, ...]
    storage: frozenset[int]


def split(gm: fx.GraphModule, values: dict[fx.Node, Any]) -> Halves:
    """Split a decode graph.

    Args:
        gm: the graph; it is not changed.
        values: of its nodes.

    Raises:
        Inseparable: says why.
    """
    arguments = [n for n in gm.graph.nodes if n.op == "placeholder"]
    calls = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    if any(is_mapped(values[n]) for n in calls):
        # Bug: no step of transformers 4.57 was compiled. What opens and closes a vmap has no inputs
        # that would keep it with what is inside.
        raise Inseparable("it has a vmap")
    storage = _storage(calls)
    slow = symbols([values[n] for n in storage])

    def moves(node: fx.Node) -> bool:
        return bool(symbols(values[node]) - slow)

    head = {n for n in calls if moves(n) or any(map(moves, n.all_input_nodes))}
    head = _with_ancestors(head)
    _check_writes(calls, head, arguments, values)
    if head.intersection(n for n in calls if n.target in ATTENDS):
        raise Inseparable("shapes of the layers depend on the length of the sequence")
    body = [n for n in calls if n not in head]
    wanted = _results(gm)
    needed = {i for n in body for i in n.all_input_nodes} | {
        n for n in wanted if isinstance(n, fx.Node)
    }
    crossing = [n for n in calls if n in head and n in needed and isinstance(values[n], Tensor)]
    plain = [n for n in calls if n in head and n in needed and not isinstance(values[n], Tensor)]
    head_gm, head_args = _part(gm, [n for n in calls if n in head], arguments, (), crossing)
    copied = _with_ancestors(plain)
    if any(map(moves, copied)):
        raise Inseparable("the layers use integers that change from step to step")
    results = [n for n in dict.fromkeys(wanted) if n in body]
    body_calls = [n for n in calls if n in copied or n not in head]
    body_gm, body_args = _part(gm, body_calls, arguments, crossing, results)

    def place(node: Any) -> Place:
        if not isinstance(node, fx.Node):
            return "constant", node
        for name, nodes in (("args", arguments), ("head", crossing), ("body", results)):
            if node in nodes:
                return name, nodes.index(node)
        raise Inseparable(f"result {node.name} is an integer that changes from step to step")

    return Halves(
        head_gm,
        body_gm,
        tuple(map(place, head_args)),
        tuple(map(place, body_args)),
        tuple(map(place, wanted)),
        tuple(values[n] for n in head_args),
        tuple(values[n] for n in body_args),
        frozenset(i for i, n in enumerate(body_args) if n in storage),
    )


def _storage(calls: Iterable[fx.Node]) -> set[fx.Node]:
    """Placeholders that attention reads keys and values from, and the importance of tokens."""
    found: set[fx.Node] = set()
    for node in calls:
        if node.target in ATTENDS:
            found |= {t for side in node.args[2:4] for t in side}
        elif node.target is UPDATE:
            found.add(node.args[0])
    return found


def _with_ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes and all that they are computed from, placeholders left out."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found and node.op != "placeholder":
            found.add(node)
            todo += node.all_input_nodes
    return found


def _check_writes(
    calls: list[fx.Node], head: set[fx.Node], arguments: list[fx.Node],
    values: dict[fx.Node, Any],
) -> None:  # fmt: skip
    """Refuse writes to arguments other than packed caches, and to what both halves know."""

    def storages(nodes: Iterable[fx.Node]) -> set[int]:
        tensors = (values[n] for n in nodes if isinstance(values[n], Tensor))
        return {t.untyped_storage()._cdata for t in tensors}

    given = storages(arguments)
    in_head, in_body = storages(head), storages(n for n in calls if n not in head)
    for node in calls:
        if node.target in (APPEND, UPDATE):
            if node in head:
                raise Inseparable(f"{node.name} depends on the length of the sequence")
            continue
        changed = storages(written(node))
        if changed & given:
            raise Inseparable(f"{node.name} writes to an argument")
        if changed & in_head & in_body:
            raise Inseparable(f"{node.name} writes to what both halves know")


def _results(gm: fx.GraphModule) -> tuple[Any, ...]:
    (results,) = next(n for n in gm.graph.nodes if n.op == "output").args
    return tuple(results)


def _part(
    gm: fx.GraphModule, nodes: list[fx.Node], arguments: list[fx.Node],
    crossing: Iterable[fx.Node], results: list[fx.Node],
) -> tuple[fx.GraphModule, list[fx.Node]]:  # fmt: skip
    """A graph of ``nodes`` that returns ``results``; and the nodes that are its inputs."""
    used = {i for n in nodes for i in n.all_input_nodes}
    inputs = [n for n in (*arguments, *crossing) if n in used]
    graph = fx.Graph()
    made = {n: graph.placeholder(n.name) for n in inputs}
    for node in nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[n] for n in results))
    graph.lint()
    return fx.GraphModule(gm, graph), inputs
