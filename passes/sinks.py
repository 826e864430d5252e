"""Sinks among the scores: in each row one score more, which is cut off behind the softmax.

s = cat([s, sinks.reshape(1, -1, 1, 1).expand(B, -1, Q, 1)], -1)
s = s - s.max(-1, keepdim=True).values                                    or not
p = softmax(s, -1)[..., :-1]
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .base import argument, calls, shape_of
from .find_writes import is_written
from .views import is_cast

_SUB = ("sub", torch.sub, operator.sub)
_MAX = ("max", torch.max)
_AMAX = ("amax", torch.amax)
_RESHAPE = ("view", "reshape", torch.reshape)
_EXPAND = ("expand", torch.Tensor.expand)
_ALL_BUT_LAST = slice(None, -1, None)


def without_max(node: Any) -> Any:
    """``s`` of ``s - max(s)`` over keys, which is all the same to a softmax; else ``node``."""
    if not calls(node, *_SUB) or node.kwargs.get("alpha", 1) != 1:
        return node
    scores, top = argument(node, 0, "input"), argument(node, 1, "other")
    if calls(top, operator.getitem, getattr) and top.args[1] in (0, "values"):
        top = top.args[0]
    elif calls(top, *_MAX):  # a pair, or the largest of all
        return node
    if not calls(top, *_MAX, *_AMAX) or argument(top, 0, "input") is not scores:
        return node
    kept = argument(top, 2, "keepdim", False) is True
    last = argument(top, 1, "dim") in (-1, len(shape_of(scores) or ()) - 1)
    return scores if kept and last else node


def joined(node: Any) -> tuple[Any, Any] | None:
    """Scores and the last column that they are joined with; None if ``node`` is no such cat."""
    if not calls(node, torch.cat, torch.concat):
        return None
    operands = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", 0)
    if not isinstance(operands, (list, tuple)) or len(operands) != 2 or dim not in (-1, 3):
        return None
    return operands[0], operands[1]


def cuts_last(node: fx.Node) -> bool:
    """Whether ``node`` is ``x[..., :-1]``."""
    if not calls(node, operator.getitem) or not isinstance(node.args[1], tuple):
        return False
    index, rank = list(node.args[1]), len(shape_of(node.args[0]) or ())
    if index[:1] == [Ellipsis]:
        index[:1] = [slice(None)] * (rank - len(index) + 1)
    return index == [slice(None)] * (rank - 1) + [_ALL_BUT_LAST]


def logits(column: Any, heads: Any) -> fx.Node | None:
    """The tensor of ``heads`` numbers that ``column [B, heads, Q, 1]`` repeats, in any shape."""
    if (shape_of(column) or ())[1:2] != (heads,) or not isinstance(heads, int):
        return None
    while not is_written(column):
        if is_cast(column):
            column = column.args[0]
        elif calls(column, *_EXPAND):
            column = argument(column, 0, "input")
        else:
            break
    if is_written(column) or (shape_of(column) or ())[-3:] != (heads, 1, 1):
        return None
    if any(size != 1 for size in (shape_of(column) or ())[:-3]):
        return None
    while calls(column, *_RESHAPE) and not is_written(argument(column, 0, "input")):
        column = argument(column, 0, "input")  # as many numbers, in the same order
    return column
