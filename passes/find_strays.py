"""Find caches that grow, and whose attention no pass has recognised: none is left out silently.

    keys = cat([past, new], -2);  ... (q[..., None, :] * keys[:, :, None]).sum(-1) ...;  return keys
        ->  Skip("keys", "a cache grows here, but its attention was not recognised: left dense")

A cache belongs to the attention that it reaches through at most one projection, for caches of
latents are projected before they are attended to.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable

import torch
from torch import fx

from ..cache import PackedKV
from .ancestry import reached_from
from .base import PassReport, Skip, argument, calls, output_of, shape_of, value_of

REASON = "a cache grows here, but its attention was not recognised: left dense"


def find_strays(graph: fx.Graph, attention: Iterable[str]) -> PassReport:
    """The growing caches that reach none of the nodes named ``attention``."""
    names = frozenset(attention)
    known = {node for node in graph.nodes if node.name in names}
    known = known.union(*(reached_from(node, 0) for node in known))
    stored = frozenset(output_of(graph).all_input_nodes)
    skipped: list[Skip] = []
    told: set[fx.Node] = set()
    for node in graph.nodes:
        if grows(node, stored) and known.isdisjoint(reached_from(node, 1)):
            reached = reached_from(node, 0)
            if told.isdisjoint(reached):  # else it is the values of keys that were named
                skipped.append(Skip(node.name, REASON))
            told |= reached
    return PassReport("find_strays", 0, tuple(skipped))


def grows(node: fx.Node, stored: Collection[fx.Node]) -> bool:
    """Whether ``node`` is a cache of four dimensions that grows by a cat and is stored.

    What is stored may be cut, as sliding windows are.
    """
    if not calls(node, torch.cat, torch.concat) or len(shape_of(node) or ()) != 4:
        return False
    operands, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if not isinstance(operands, (list, tuple)) or len(operands) != 2 or dim not in (1, 2, -2, -3):
        return False
    past = operands[0]
    if shape_of(past) != (0,) and (
        past.op != "placeholder" or isinstance(value_of(past), PackedKV)
    ):
        return False  # what becomes of packed inputs the plan says
    return node in stored or any(
        user in stored for user in node.users if calls(user, operator.getitem)
    )
