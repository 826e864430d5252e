"""Data-flow questions: which hidden state was this made from, what is made of this cache?"""

from __future__ import annotations

import networkx as nx
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from .base import MATMUL, argument, calls, shape_of, value_of
from .find_writes import base_of, written

_PROJECTIONS = (torch.nn.functional.linear, torch._C._nn.linear, torch.addmm)
_GIVEN = ("placeholder", "get_attr")
_LIKE = (torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like,
         "new_zeros", "new_ones", "new_empty", "new_full")  # fmt: skip


def is_projection(node: fx.Node) -> bool:
    """Whether ``node`` is a linear layer, by that name or as a product with a given matrix."""
    if not calls(node, *MATMUL):
        return calls(node, *_PROJECTIONS)
    matrix = argument(node, 1, "other")
    base = base_of(matrix) if isinstance(matrix, fx.Node) else None
    if base is None or base.op not in _GIVEN:
        return False
    # Frequencies times positions are a product with what is given too, and no linear layer.
    both = len(shape_of(base) or ()) == len(shape_of(matrix) or ()) == 2
    return both and value_of(base).is_floating_point()


def as_networkx(graph: fx.Graph) -> nx.DiGraph:
    """Nodes of ``graph`` with an edge from each input to its user."""
    view = nx.DiGraph()
    for node in graph.nodes:
        view.add_node(node)
        view.add_edges_from((source, node) for source in node.all_input_nodes)
    return view


def projected_from(flow: nx.DiGraph, node: fx.Node, levels: int = 2) -> frozenset[fx.Node]:
    """The activations that go into the nearest linear layers above ``node``.

    ``levels`` 2 also takes the next linear layers above those, so that a query made by two of
    them in a row (low-rank query projections) still shares its hidden state with the key.
    """
    found: set[fx.Node] = set()
    frontier = {node}
    for _ in range(levels):
        above: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        stack = list(frontier)
        while stack:
            here = stack.pop()
            if here in seen:
                continue
            seen.add(here)
            if is_projection(here):
                activation = (
                    argument(here, 1, "mat1")
                    if here.target is torch.addmm
                    else argument(here, 0, "input")
                )
                if isinstance(activation, fx.Node):
                    above.add(activation)
            else:
                stack.extend(flow.predecessors(here))
        found |= above
        frontier = above
    return frozenset(found)


def weight_above(flow: nx.DiGraph, node: fx.Node) -> fx.Node | None:
    """The input of the graph that is the weight of the nearest linear layer above ``node``.

    A weight that is computed (dequantised, cast) is named by the first input it is made from. None
    if the nearest layer's weight comes from no input: never the weight of a layer further up.
    """
    above = [node, *(child for _, child in nx.bfs_edges(flow, node, reverse=True))]
    layer = next((here for here in above if is_projection(here)), None)
    if layer is None:
        return None
    if layer.target is torch.addmm:
        weight = argument(layer, 2, "mat2")
    else:
        weight = argument(layer, 1, "other" if calls(layer, *MATMUL) else "weight")
    if not isinstance(weight, fx.Node):
        return None
    made_of = [weight, *(child for _, child in nx.bfs_edges(flow, weight, reverse=True))]
    return next((n for n in made_of if n.op in _GIVEN), None)


def is_made_of(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``source`` is ``node``, or among what its numbers are made of; sizes do not count."""
    stack, seen = [node], set[fx.Node]()
    while stack:
        here = stack.pop()
        if here is source:
            return True
        if here in seen or here < source or calls(here, *_LIKE) or _is_size(value_of(here)):
            continue
        seen.add(here)
        stack += here.all_input_nodes
    return False


def _is_size(value: object) -> bool:
    """Whether a value is made of sizes alone; a number that is read out of a tensor is not."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return not free_unbacked_symbols(value)
    return not holds_tensors(value)


def reached_from(node: fx.Node, projections: int) -> frozenset[fx.Node]:
    """The tensors made of ``node`` with at most this many linear layers in a row.

    Sizes are not followed: masks of all layers are made of them.
    """
    found: set[fx.Node] = set()
    frontier = {node}
    for _ in range(projections + 1):
        beyond: set[fx.Node] = set()
        stack = list(frontier)
        while stack:
            here = stack.pop()
            for user in (*here.users, *(u for x in written(here) for u in base_of(x).users)):
                if is_projection(user):
                    beyond.add(user)
                elif user not in found and holds_tensors(value_of(user)):
                    found.add(user)
                    stack.append(user)
        frontier = beyond
    return frozenset(found)


def holds_tensors(value: object) -> bool:
    """Whether a value of a graph is a tensor, or has some in it."""
    if isinstance(value, (tuple, list)):
        return any(holds_tensors(item) for item in value)
    return isinstance(value, torch.Tensor)
