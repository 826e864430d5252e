"""Factors of scores that are tensors: a learned temperature, a factor of each head.

    matmul(q, k.transpose(2, 3)) * t       ->      matmul(q * t, k.transpose(2, 3))
    matmul(q, k.transpose(2, 3)) / t                   t [B|1, Hq|1, Q|1, 1], or of one number

What is the same for all keys of a query scales that query as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .base import same_size, shape_of, value_of
from .mask import apart, mask_part

aten = torch.ops.aten


@dataclass(frozen=True)
class Factor:
    """One tensor that scores are multiplied with, the same for all keys.

    Attributes:
        node: it broadcasts to ``[B, Hq, Q, 1]``.
        inverse: whether scores are divided by it.
        joined: whether its first dimension is ``B * Hq``, heads side by side with sequences.
    """

    node: fx.Node
    inverse: bool = False
    joined: bool = False


def factor_of(node: Any, scores: tuple[Any, ...], inverse: bool) -> Factor | None:
    """``node`` as a factor of scores of these sizes; None if it differs from key to key.

    Scores are ``[B, Hq, Q, S]`` or ``[B * Hq, Q, S]``.
    """
    value, shape = value_of(node), shape_of(node)
    if shape is None or value.dtype == torch.bool or value.is_complex():
        return None
    part = mask_part(node, scores)
    if part is None or not all(same_size(size, 1) for size in shape[-1:]):
        return None
    return Factor(node, inverse, part.joined)


def write_factors(
    graph: fx.Graph, q: fx.Node, factors: tuple[Factor, ...], nodes: Mapping[fx.Node, fx.Node],
    heads: int, dtype: torch.dtype,
) -> fx.Node:  # fmt: skip
    """Queries ``[B, Hq, Q, D]`` times all factors, in ``dtype``, at the insertion point.

    Args:
        graph: a copy of the graph that the factors were found in.
        q: the queries there.
        factors: the factors.
        nodes: the copies of their nodes.
        heads: query heads.
        dtype: of the queries.
    """
    for factor in factors:
        node = nodes[factor.node]
        if factor.joined:
            node = apart(graph, node, heads)
        target = aten.div.Tensor if factor.inverse else aten.mul.Tensor
        q = graph.call_function(target, (q, node))
        if value_of(factor.node).dtype != dtype:
            q = graph.call_function(aten.to.dtype, (q, dtype))
    return q
