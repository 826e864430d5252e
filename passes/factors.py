"""Factors of scores that are no constants: a learned temperature, a factor of each head.

    matmul(q, k.transpose(2, 3)) * t       ->      matmul(q * t, k.transpose(2, 3))
    matmul(q, k.transpose(2, 3)) / t                   t [B|1, Hq|1, Q|1, 1], or of one number

What is the same for all keys of a query scales that query as well; so does a number that is made
of sizes.
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
    """One tensor or number that scores are multiplied with, the same for all keys.

    Attributes:
        node: a number, or it broadcasts to ``[B, Hq, Q, 1]``.
        inverse: whether scores are divided by it.
        joined: whether its first dimension is ``B * Hq``, heads side by side with sequences.
    """

    node: fx.Node
    inverse: bool = False
    joined: bool = False


def factor_of(node: fx.Node, scores: tuple[Any, ...], inverse: bool) -> Factor | str:
    """``node`` as a factor of scores of these sizes, or why it is none.

    Scores are ``[B, Hq, Q, S]`` or ``[B * Hq, Q, S]``.
    """
    shape = shape_of(node)
    if shape is None:
        return Factor(node, inverse)
    if not all(same_size(size, 1) for size in shape[-1:]):
        return "scores are multiplied by a tensor that differs from key to key: left dense"
    part = mask_part(node, scores)
    if part is None:
        return "scores are multiplied by a tensor that does not fit them: left dense"
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
        value, operator = value_of(factor.node), aten.div if factor.inverse else aten.mul
        if not isinstance(value, torch.Tensor):
            q = graph.call_function(operator.Scalar, (q, node))
            continue
        q = graph.call_function(operator.Tensor, (q, node))
        if value.dtype != dtype:
            q = graph.call_function(aten.to.dtype, (q, dtype))
    return q
