"""Find the weights that the packed caches of a graph depend on: those of its decoder.

    hidden = embedding(ids, table)     or an input, or with image features scattered into it
    ... = linear(norm(hidden, w0), w1) ...              ->  w0, w1, ..., and nothing above hidden

What lies behind the first hidden state is the same whether the graph embeds tokens, takes
embeddings as they come, or merges images into them. Frequencies of a rotary embedding, an input
that is no weight, change the keys as well and are among what is found.
"""

from __future__ import annotations

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
    start = _first_hidden_state(graph, flow, sites[0])
    if start is None:
        return ()
    behind = nx.descendants(flow, start) | {start}
    varying = _varying(graph)
    found: set[fx.Node] = set()
    for node in behind - {start}:
        for source in node.all_input_nodes:
            if source not in behind and source not in varying:
                found |= {n for n in _above(flow, source) if _is_weight(n)}
    for site in sites:
        found |= {n for n in (site.k.weight,) if n is not None}
        found |= _frequencies(flow, site)
    return tuple(n for n in graph.nodes if n in found)


def _first_hidden_state(graph: fx.Graph, flow: nx.DiGraph, site: CachedSite) -> fx.Node | None:
    """The first ``[B, S, C]`` above the key projection, with the sizes of what that projects."""
    projected = projected_from(flow, site.k.new, levels=1)
    if not projected:
        return None
    hidden = next(n for n in graph.nodes if n in projected)
    batch, _, tokens, _ = shape_of(site.k.new) or (None,) * 4
    channels = (shape_of(hidden) or (None,))[-1]
    above = _above(flow, hidden)
    for node in graph.nodes:
        value, shape = value_of(node), shape_of(node)
        if node not in above or shape is None or len(shape) != 3 or _is_weight(node):
            continue
        alike = zip(shape, (batch, tokens, channels), strict=True)
        if value.is_floating_point() and all(same_size(a, b) for a, b in alike):
            return node
    return hidden


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
