"""Find the rotary position embedding of new keys, by structure.

    turned = k * cos + partner(k) * sin                        [B, H, S, D]    <- new keys
    partner(k) = cat([-k[..., D/2:], k[..., :D/2]], -1)        halves
               = stack([-k[..., 1::2], k[..., ::2]], -1)       neighbours: interleaved
    new = turned, or cat([turned, rest], -1)                   partial rotation
    new = new.transpose(1, 2)                                  if heads come later

Nothing is rewritten: fitting needs the cosines and sines to see keys as they were before, and the
angle that a position adds (:mod:`apack_compile.codec.rotation`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from .base import argument, calls

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_MUL = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_CAT = (torch.cat, torch.concat)
_STACK = (torch.stack,)
_NEG = (operator.neg, torch.neg, "neg")
_SHAPE = ("to", "float", "half", "bfloat16", "type_as", "contiguous", "reshape", "view", "flatten",
          torch.flatten, operator.getitem)  # fmt: skip


@dataclass(frozen=True)
class FoundRotation:
    """What new keys are rotated with.

    Attributes:
        cos, sin: as the graph multiplies with them.
        interleaved: pairs are neighbours, not halves.
    """

    cos: fx.Node
    sin: fx.Node
    interleaved: bool


def find_rotation(flow: nx.DiGraph, new: fx.Node) -> FoundRotation | None:
    """The rotation that made ``new``, or None if it is of no known form."""
    node = _before_heads(_through(new))
    if calls(node, *_CAT):
        parts = argument(node, 0, "tensors")
        node = _through(parts[0]) if isinstance(parts[0], fx.Node) else node
    if not calls(node, *_ADD):
        return None
    terms = [_through(term) for term in node.args[:2] if isinstance(term, fx.Node)]
    if len(terms) != 2 or not all(calls(term, *_MUL) for term in terms):
        return None
    for straight, crossed in (terms, terms[::-1]):
        for x, cos in _orders(straight):
            for turned, sin in _orders(crossed):
                pair = _partner_of(turned)
                if pair is not None and nx.has_path(flow, _through(x), pair[0]):
                    return FoundRotation(cos, sin, pair[1])
    return None


def _orders(product: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    a, b = product.args[:2]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return []
    return [(a, b), (b, a)]


def _through(node: fx.Node) -> fx.Node:
    """Past casts and ``contiguous``."""
    while calls(node, "to", "float", "half", "bfloat16", "type_as", "contiguous"):
        node = node.args[0]
    return node


def _before_heads(node: fx.Node) -> fx.Node:
    """Past a transposition of heads and tokens, for rotations of ``[B, S, H, D]``."""
    if calls(node, "transpose", "swapaxes", torch.transpose):
        dims = argument(node, 1, "dim0"), argument(node, 2, "dim1")
        if {d % 4 for d in dims} == {1, 2}:
            return _through(node.args[0])
    if calls(node, "permute", torch.permute):
        order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        if [d % 4 for d in order] == [0, 2, 1, 3]:
            return _through(node.args[0])
    return node


def _partner_of(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """The ``cat`` or ``stack`` of (-second, first) that ``node`` is, and whether interleaved."""
    while calls(node, *_SHAPE):
        node = node.args[0]
    if not calls(node, *_CAT, *_STACK):
        return None
    parts = argument(node, 0, "tensors")
    if len(parts) != 2 or argument(node, 1, "dim", 0) != -1 or not calls(parts[0], *_NEG):
        return None
    return node, calls(node, *_STACK)
