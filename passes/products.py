"""The two products of attention that is written out: which tensors are multiplied.

matmul(q, k.transpose(2, 3))      bmm(q, k.transpose(1, 2))      einsum("bhqd,bhkd->bhqk", q, k)
matmul(p, v)                      bmm(p, v)                      einsum("bhqk,bhkd->bhqd", p, v)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .base import MATMUL, argument, calls, shape_of
from .einsum import scores_operands, sum_operands
from .find_writes import is_written
from .regroup import regrouped

_BMM = ("bmm", torch.bmm)
_BADDBMM = ("baddbmm", torch.baddbmm)

Operands = tuple[fx.Node, fx.Node]


def is_baddbmm(node: fx.Node) -> bool:
    """Whether ``node`` is ``beta * input + alpha * batch1 @ batch2``."""
    return calls(node, *_BADDBMM)


def scores_of(node: fx.Node) -> Operands | None:
    """Queries and keys, these not transposed, whose product ``node`` is, but for what it adds."""
    if calls(node, *MATMUL, *_BMM):
        return _turned_back(*_factors(node))
    if is_baddbmm(node):
        return _turned_back(argument(node, 1, "batch1"), argument(node, 2, "batch2"))
    q, k = scores_operands(node) or (None, None)
    return (q, k) if isinstance(q, fx.Node) and isinstance(k, fx.Node) else None


def weighted(node: fx.Node) -> tuple[Any, Any]:
    """Weights and values whose product ``node`` is; None twice if it is none."""
    return _factors(node) if calls(node, *MATMUL, *_BMM) else sum_operands(node) or (None, None)


def _factors(node: fx.Node) -> tuple[Any, Any]:
    return argument(node, 0, "input"), argument(node, 1, "mat2" if calls(node, *_BMM) else "other")


def _turned_back(q: Any, turned: Any) -> Operands | None:
    """Queries, and keys of ``turned [..., D, S]``."""
    if not isinstance(q, fx.Node) or not isinstance(turned, fx.Node):
        return None
    if len(shape_of(q) or ()) != len(shape_of(turned) or ()) or is_written(turned):
        return None
    k = _transposed(turned)
    if k is None:  # turned before heads came to lie side by side
        root = regrouped(turned)
        k = _transposed(root) if len(shape_of(root) or ()) == 4 else None
    return None if k is None else (q, k)


def _transposed(node: Any) -> fx.Node | None:
    """``x`` of ``x.transpose(-1, -2)``."""
    rank = len(shape_of(node) or ())
    if not isinstance(node, fx.Node) or is_written(node) or rank not in (3, 4):
        return None
    if calls(node, "transpose", torch.transpose, "swapaxes"):
        dims = {argument(node, 1, "dim0"), argument(node, 2, "dim1")}
        if {d % rank for d in dims if isinstance(d, int)} != {rank - 2, rank - 1}:
            return None
    elif calls(node, "permute", torch.permute):
        order = argument(node, 1, "dims", ())
        order = order if isinstance(order, (tuple, list)) else node.args[1:]
        if [d % rank for d in order] != [*range(rank - 2), rank - 1, rank - 2]:
            return None
    elif not (calls(node, getattr) and node.args[1] == "mT"):
        return None
    x = argument(node, 0, "input")
    return x if isinstance(x, fx.Node) else None
