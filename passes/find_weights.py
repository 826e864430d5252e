"""Find the weights that the packed caches of a graph depend on: those of its decoder.

    hidden = embedding(ids, table)     or an input, or with image features scattered into it
    ... = linear(norm(hidden, w0), w1) ...
    last = norm(..., w9)                                ->  w0, w1, ..., w9, neither table nor head
    logits = linear(last, head)

What lies between the first hidden state and the last is the same whether a graph embeds tokens,
takes embeddings as they come, or merges images into them, and whether it goes on to logits or
leaves them to another graph. Frequencies of a rotary embedding, an input that is no weight, change
the keys as well and are among what is found.
"""

from __future__ import annotations

from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from .ancestry import as_networkx, projected_from
from .base import same_size, shape_of, value_of
from .find_rotation import find_rotation
from .find_updates import CachedSite


def find_weights(graph: fx.Graph, sites: tuple[CachedSite, ...]) -> tuple[fx.Node, ...]:
    """Inputs and attributes of the graph on which the caches of ``sites`` depend.

    Returns:
        In the order of the graph. Nothing if no linear layer makes the keys of the first site.
    """
    flow = as_networkx(graph)
    hidden = hidden_states(graph, flow, sites[0])
    if not hidden:
        return ()
    behind = nx.descendants(flow, hidden[0]) & _above(flow, hidden[-1])
    varying = _varying(graph)
    found: set[fx.Node] = set()
    for node in behind:
        for source in node.all_input_nodes:
            if source not in behind and source not in varying:
                found |= {n for n in _above(flow, source) if _is_weight(n)}
    for site in sites:
        found |= {n for n in (site.k.weight,) if n is not None}
        found |= _frequencies(flow, site)
    return tuple(n for n in graph.nodes if n in found)


def hidden_states(graph: fx.Graph, flow: nx.DiGraph, site: CachedSite) -> list[fx.Node]:
    """Hidden states on the way to, through and from ``site``, in the order of the graph.

    They are ``[B, S, C]``, with the sizes of what the key projection of ``site`` takes. Nothing
    if there is no such projection.
    """
    projected = projected_from(flow, site.k.new, levels=1)
    shape = shape_of(site.k.new)
    if not projected or shape is None:
        return []
    source = next(n for n in graph.nodes if n in projected)
    channels = (shape_of(source) or (None,))[-1]
    sizes = shape[0], shape[2], channels
    related = _above(flow, source) | nx.descendants(flow, source)
    return [n for n in graph.nodes if n in related and _is_hidden(n, sizes)] or [source]


def _is_hidden(node: fx.Node, sizes: tuple[Any, ...]) -> bool:
    shape = shape_of(node)
    if shape is None or len(shape) != 3 or _is_weight(node):
        return False
    alike = all(same_size(a, b) for a, b in zip(shape, sizes, strict=True))
    return alike and value_of(node).is_floating_point()


def _above(flow: nx.DiGraph, node: fx.Node) -> set[fx.Node]:
    return nx.ancestors(flow, node) | {node}


def _is_weight(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr") and isinstance(value_of(node), torch.nn.Parameter)


def _varying(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on an input tensor that is no weight."""
    varying: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if isinstance(value_of(node), Tensor) and not _is_weight(node):
                varying.add(node)
        elif any(source in varying for source in node.all_input_nodes):
            varying.add(node)
    return varying


def _frequencies(flow: nx.DiGraph, site: CachedSite) -> set[fx.Node]:
    """One-dimensional inputs that the rotation of the keys is made from."""
    rotation = find_rotation(flow, site.k.new)
    if rotation is None:
        return set()
    return {
        n
        for n in _above(flow, rotation.cos)
        if n.op in ("placeholder", "get_attr")
        and len(shape_of(n) or ()) == 1
        and value_of(n).is_floating_point()
    }
