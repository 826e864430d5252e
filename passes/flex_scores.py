"""What a score_mod of flex_attention does to scores."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .base import value_of
from .flex_ops import CASTS
from .flex_records import Ref, Scores, Unread
from .scores import HIDDEN

if TYPE_CHECKING:
    from .flex_mods import Reader

aten = torch.ops.aten


def of_scores(reader: Reader, name: str, node: fx.Node, args: Any, kwargs: Any) -> Scores:
    """What an operator makes of scores.

    Raises:
        Unread: that is not known.
    """
    if kwargs and name not in CASTS:
        raise Unread(f"{name} of scores is not known")
    if name in CASTS and isinstance(args[0], Scores):
        if value_of(node).is_floating_point():
            return args[0]
    elif name == "tanh":
        return _capped(args[0])
    elif name in ("add", "mul") and len(args) == 2:
        scores, other = args if isinstance(args[0], Scores) else args[::-1]
        return _plus(reader, scores, other) if name == "add" else _times(scores, other)
    elif name == "sub" and isinstance(args[0], Scores) and isinstance(args[1], (Ref, int, float)):
        return _plus(reader, args[0], reader.call(aten.mul.Tensor, _term(reader, args[1]), -1))
    elif name in ("div", "truediv", "true_divide") and isinstance(args[0], Scores):
        return _times(args[0], args[1], True)
    elif name == "where" and len(args) == 3:
        return _hidden(reader, *args)
    elif name == "masked_fill" and isinstance(args[0], Scores) and isinstance(args[1], Ref):
        return _hidden(reader, reader.call(aten.logical_not.default, args[1]), args[0], args[2])
    raise Unread(f"{name} of scores is not known")


def _capped(scores: Scores) -> Scores:
    if scores.cap or scores.added is not None or scores.seen is not None:
        raise Unread("what is capped are no plain scores")
    return replace(scores, cap=1.0)


def _plus(reader: Reader, scores: Scores, other: Any) -> Scores:
    term = _term(reader, other)
    added = term if scores.added is None else reader.call(aten.add.Tensor, scores.added, term)
    return replace(scores, added=added)


def _term(reader: Reader, value: Any) -> Ref:
    """What is added to scores, in their dtype."""
    if isinstance(value, Ref):
        return reader.call(aten.to.dtype, value, reader.dtype)
    if isinstance(value, (int, float)):
        return reader.filled(float(value), reader.dtype)
    raise Unread("what is added to scores is not known")


def _times(scores: Scores, other: Any, inverse: bool = False) -> Scores:
    known = value_of(other)
    if isinstance(known, (torch.SymFloat, torch.SymInt)):
        known = float(known)  # with dynamic=True; Dynamo then guards this number
    if not isinstance(known, (int, float)) or not known:
        raise Unread("scores are multiplied by what is no constant")
    if scores.added is not None or scores.seen is not None:
        raise Unread("what is added to scores is multiplied with them")
    factor = 1 / known if inverse else known
    if scores.cap:
        return replace(scores, cap=scores.cap * factor)
    return replace(scores, factor=scores.factor * factor)


def _hidden(reader: Reader, condition: Any, chosen: Any, other: Any) -> Scores:
    if not isinstance(condition, Ref):
        raise Unread("which scores are hidden depends on them")
    if isinstance(other, Scores):
        condition = reader.call(aten.logical_not.default, condition)
        chosen, other = other, chosen
    if not isinstance(other, (int, float)) or not other <= HIDDEN:
        raise Unread("other numbers are put in the place of scores")
    return replace(chosen, seen=reader.both(chosen.seen, condition))
