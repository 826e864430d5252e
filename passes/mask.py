"""What is laid over scores: tensors that are added, and such that hide tokens.

    scores * scale + alibi * beta + mask          parts (alibi, factor=beta), (mask)
    where(seen, scores + bias, -inf)              parts (bias), (seen)

A token that one part hides is hidden, whatever the others add to its score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .base import same_size, shape_of, value_of

OTHER_MASK = "a mask that does not fit the scores is laid over them: left dense"

FAINT = -1e29
"""A score so low that no other counts beside it, and still a number in any unit (log2 too)."""


@dataclass(frozen=True)
class MaskPart:
    """One tensor over the scores, broadcastable to ``[B, Hq, Q, S]``.

    Attributes:
        node: numbers that are added, or bool.
        hides: whether a bool says which tokens are hidden, not which are seen.
        faint: whether hidden tokens have a very low score, so that a query which sees none looks at
            all of them alike; else it looks at nothing.
        factor: of numbers.
        joined: whether its first dimension is ``B * Hq``, heads side by side with sequences.
    """

    node: fx.Node
    hides: bool = False
    faint: bool = False
    factor: float = 1.0
    joined: bool = False

    @property
    def adds(self) -> bool:
        """Whether it is added to the scores."""
        return bool(value_of(self.node).dtype != torch.bool)


@dataclass(frozen=True)
class Mask:
    """All that is laid over the scores of one attention; at least one part."""

    parts: tuple[MaskPart, ...]

    def __add__(self, part: MaskPart) -> Mask:
        return Mask((*self.parts, part))

    def scaled(self, factor: float) -> Mask | None:
        """The mask of scores that are scaled behind it; None if hidden tokens would be seen."""
        if factor <= 0 and not all(part.adds for part in self.parts):
            return None
        return Mask(
            tuple(replace(p, factor=p.factor * factor) if p.adds else p for p in self.parts)
        )


def mask_part(
    node: fx.Node, scores: tuple[Any, ...], hides: bool = False, faint: bool = False
) -> MaskPart | None:
    """``node`` laid over ``scores`` of these sizes: ``[B, Hq, Q, S]`` or ``[B * Hq, Q, S]``.

    None if it makes them larger, or its heads cannot be told.
    """
    shape = shape_of(node)
    if shape is None or len(shape) > len(scores):
        return None
    facing = zip(reversed(shape), reversed(scores), strict=False)
    if any(_differ(size, wanted) and not same_size(size, 1) for size, wanted in facing):
        return None
    if len(scores) == 4 or len(shape) < 3 or same_size(shape[0], 1):
        return MaskPart(node, hides, faint)
    return MaskPart(node, hides, faint, joined=True) if same_size(shape[0], scores[0]) else None


def write_mask(
    graph: fx.Graph, mask: Mask, nodes: Mapping[fx.Node, fx.Node], heads: int
) -> fx.Node:
    """All parts as one tensor, at the insertion point; if it is bool, True where a token is seen.

    Args:
        graph: a copy of the graph that the mask was found in.
        mask: the mask.
        nodes: the copies of its nodes.
        heads: query heads.
    """
    aten, call = torch.ops.aten, graph.call_function
    added: fx.Node | None = None
    seen: fx.Node | None = None
    shown: fx.Node | None = None
    for part in mask.parts:
        node = nodes[part.node]
        if part.joined:
            node = apart(graph, node, heads)
        if not part.adds:
            node = call(aten.logical_not.default, (node,)) if part.hides else node
            before = shown if part.faint else seen
            node = node if before is None else call(aten.logical_and.default, (before, node))
            seen, shown = (seen, node) if part.faint else (node, shown)
            continue
        if value_of(part.node).dtype != torch.float64:
            node = call(aten.to.dtype, (node, torch.float32))
        if part.factor != 1:
            node = call(aten.mul.Scalar, (node, part.factor))
        added = node if added is None else call(aten.add.Tensor, (added, node))
    if shown is not None and added is not None:
        added = call(aten.where.ScalarOther, (shown, added, FAINT))
    elif shown is not None:
        added = call(aten.where.Scalar, (shown, 0.0, FAINT))
    if seen is not None and added is not None:
        return call(aten.where.ScalarOther, (seen, added, float("-inf")))
    one = added if seen is None else seen
    assert one is not None, "a mask has a part"
    return one


def apart(graph: fx.Graph, node: fx.Node, heads: int) -> fx.Node:
    """``[B, heads, ...]`` of ``node [B * heads, ...]``, at the insertion point."""
    return graph.call_function(torch.ops.aten.unflatten.int, (node, 0, [-1, heads]))


def _differ(size: Any, wanted: Any) -> bool:
    return isinstance(size, int) and isinstance(wanted, int) and size != wanted
