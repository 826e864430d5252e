"""Find attention that is written out: two products and a softmax.

    s = matmul(q, repeat_kv(k).transpose(2, 3)) * scale       or / a number; or q scaled before
        einsum("bhqd,bhkd->bhqk", q, repeat_kv(k)) * scale
    s = tanh(s / cap) * cap                                   or none (softcap)
    s = s + mask                                              or masked_fill(m, -inf), where(m, s, -inf)
    p = dropout(softmax(s, -1, float32).to(q.dtype), 0.0)     casts and an idle dropout, or none
    o = matmul(p, repeat_kv(v))

What a mask hides, hides the same whether -inf or a very negative number stands for it. Sinks
among the scores are read by ``sinks.py``.
"""  # noqa: E501

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .base import MATMUL, argument, calls, shape_of, value_of
from .einsum import scores_operands, sum_operands
from .find_writes import is_written, writes
from .sinks import cuts_last, joined, logits, without_max
from .views import is_cast

_SOFTMAX = ("softmax", torch.softmax, F.softmax)
_BMM = ("bmm", torch.bmm)
_RESHAPE = ("view", "reshape", torch.reshape)
_MUL = ("mul", "mul_", torch.mul, operator.mul, operator.imul)
_DIV = ("div", "div_", torch.div, operator.truediv, operator.itruediv)
_ADD = ("add", "add_", torch.add, operator.add, operator.iadd)

HIDDEN = -1e4
"""A number added to, or put in the place of, scores of tokens that are not seen is no greater."""


@dataclass(frozen=True)
class Chain:
    """Attention as it is written out.

    Attributes:
        node: the last product, ``[B, Hq, Q, Dv]``.
        q: queries.
        k, v: operands of the products, keys not transposed.
        mask: added to the scores, or bool; or None.
        hides: whether a bool mask says which tokens are hidden, not which are seen.
        scale: factor of the product of queries and keys.
        softcap: what scores are capped at before the mask is laid over them; 0: they are not.
        sinks: one score more for each query head, in any shape, or None.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    hides: bool
    scale: float
    softcap: float
    sinks: fx.Node | None


@dataclass(frozen=True)
class _Scores:
    """What a softmax is taken of: ``cap tanh(scale q.k)``, or ``scale q.k`` where cap is 0."""

    q: fx.Node
    k: fx.Node
    mask: fx.Node | None = None
    hides: bool = False
    added: bool = False
    scale: float = 1.0
    cap: float = 0.0


_Found = _Scores | str | None
"""What scores are made of; or of what unsupported form they are; or that they are none."""


def find_chain(softmax: fx.Node) -> Chain | str | None:
    """The attention around a softmax, or why it is none that is known; None: no attention."""
    if not calls(softmax, *_SOFTMAX):
        return None
    node, path = _product_above(softmax)
    if node is None:
        return None
    shape = shape_of(softmax)
    if shape is None or len(shape) != 4 or any(calls(step, *_RESHAPE) for step in path):
        return "attention written out over other than [B, heads, queries, keys]: left dense"
    if argument(softmax, 1, "dim") not in (-1, 3):
        return "the softmax is not over keys: left dense"
    if any(len(step.users) > 1 for step in path):
        return "attention weights are used by more than the values: left dense"
    v = _weighted(node)[1]
    top, reader, sinks = argument(softmax, 0, "input"), softmax, None
    cuts = [step for step in path if calls(step, operator.getitem)]
    if without_max(top) is not top:
        top, reader = without_max(top), top
    if joined(top):
        (top, column), reader = joined(top) or (None, None), top
        sinks = logits(column, shape[1])
        if sinks is None or len(cuts) != 1 or not cuts_last(cuts[0]):
            return "sinks among the scores in an unknown form: left dense"
    elif cuts:
        return "attention weights are cut behind the softmax: left dense"
    scores = _scores(top, reader)
    if isinstance(scores, str):
        return scores
    if scores is None or not isinstance(v, fx.Node):
        return "attention written out in an unknown form: left dense"
    scale = scores.scale * (scores.cap or 1.0)  # cap tanh(scale q.k / cap)
    cap = abs(scores.cap)  # tanh is odd
    return Chain(node, scores.q, scores.k, v, scores.mask, scores.hides, scale, cap, sinks)


def _product_above(softmax: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """The product with the values, if there is one, and all weights that lead to it."""
    path = [softmax]
    while True:
        following = None
        for user in path[-1].users:
            if _weighted(user)[0] is path[-1]:
                return user, path
            passed = calls(user, "contiguous", operator.getitem, *_RESHAPE)
            if passed or is_cast(user) or _is_idle_dropout(user):
                following = user
        if following is None:
            return None, path
        path.append(following)


def _weighted(node: fx.Node) -> tuple[Any, Any]:
    """Weights and values whose product a node is; None twice if it is none."""
    if calls(node, *MATMUL, *_BMM):
        return argument(node, 0, "input"), argument(node, 1, "other")
    return sum_operands(node) or (None, None)


def _is_idle_dropout(node: fx.Node) -> bool:
    if not calls(node, F.dropout, torch.dropout):
        return False
    chance, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
    training = argument(node, 2, "train", training)
    return chance == 0.0 or training is False


def _scores(node: Any, reader: fx.Node) -> _Found:
    """What ``node``, as ``reader`` reads it, is made of."""
    if not isinstance(node, fx.Node):
        return None
    if any(user is not reader and writes(user, node) for user in node.users):
        return "scores are written to in place: left dense"
    if is_cast(node) or calls(node, "contiguous"):
        return _scores(argument(node, 0, "input"), node)
    if calls(node, *MATMUL):
        return _product(node)
    operands = scores_operands(node)
    if operands is not None:
        return _Scores(*operands) if all(isinstance(o, fx.Node) for o in operands) else None
    if calls(node, *_MUL, *_DIV):
        return _scaled(node)
    if calls(node, *_ADD):
        return _added(node)
    if calls(node, "masked_fill", "masked_fill_", torch.masked_fill):
        scores, mask, value = (argument(node, i, n) for i, n in enumerate(("", "mask", "value")))
        return _hidden(_scores(scores, node), mask, value, True)
    if calls(node, torch.where):
        names = ("condition", "input", "other")
        seen, scores, value = (argument(node, i, name) for i, name in enumerate(names))
        return _hidden(_scores(scores, node), seen, value, False)
    if calls(node, "tanh", torch.tanh):
        return _capped(_scores(argument(node, 0, "input"), node))
    return None


def _product(node: fx.Node) -> _Scores | None:
    q, transposed = argument(node, 0, "input"), argument(node, 1, "other")
    if not isinstance(q, fx.Node) or not isinstance(transposed, fx.Node):
        return None
    if is_written(transposed):
        return None
    if calls(transposed, "transpose", torch.transpose, "swapaxes"):
        dims = {argument(transposed, 1, "dim0"), argument(transposed, 2, "dim1")}
        if {d % 4 for d in dims if isinstance(d, int)} != {2, 3}:
            return None
    elif calls(transposed, "permute"):
        order = argument(transposed, 1, "dims", ())
        order = order if isinstance(order, (tuple, list)) else transposed.args[1:]
        if tuple(order) != (0, 1, 3, 2):
            return None
    elif not (calls(transposed, getattr) and transposed.args[1] == "mT"):
        return None
    k = argument(transposed, 0, "input")
    return _Scores(q, k) if isinstance(k, fx.Node) else None


def _scaled(node: fx.Node) -> _Found:
    first, second = argument(node, 0, "input"), argument(node, 1, "other")
    if calls(node, *_MUL) and _number(first) is not None:
        first, second = second, first
    factor = _number(second)
    if not factor:
        return None
    found = _scores(first, node)
    if not isinstance(found, _Scores):
        return found
    factor = 1 / factor if calls(node, *_DIV) else factor
    if found.added or (found.mask is not None and factor < 0):
        return "the mask is scaled with the scores: left dense"
    if found.cap:
        return replace(found, cap=found.cap * factor)
    return replace(found, scale=found.scale * factor)


def _capped(found: _Found) -> _Found:
    if not isinstance(found, _Scores):
        return found
    if found.mask is not None:
        return "the mask is capped with the scores: left dense"
    if found.cap:
        return "scores are capped twice: left dense"
    return replace(found, cap=1.0)


def _number(value: Any) -> float | None:
    """A constant; with dynamic=True it may be a symbol, which Dynamo then guards."""
    value = value_of(value)
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return float(value)
    return value if isinstance(value, (int, float)) else None


def _added(node: fx.Node) -> _Found:
    first, second = argument(node, 0, "input"), argument(node, 1, "other")
    if node.kwargs.get("alpha", 1) != 1:
        return None
    for scores, mask in ((first, second), (second, first)):
        found = _scores(scores, node)
        if isinstance(found, str):
            return found
        if found is None:
            continue
        value = value_of(mask)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return "what is added to the scores is no mask of numbers: left dense"
        if not value.dim():
            return "a number is added to all scores: left dense"
        if found.mask is not None:
            return "two masks are laid over the scores: left dense"
        return replace(found, mask=mask, added=True)
    return None


def _hidden(found: _Found, mask: Any, value: Any, hides: bool) -> _Found:
    if not isinstance(found, _Scores):
        return found
    value, shown = _number(value), value_of(mask)
    if value is None or value > HIDDEN or not isinstance(shown, torch.Tensor):
        return "tokens are hidden in an unknown way: left dense"
    if not shown.dim() or shown.dtype != torch.bool:
        return "tokens are hidden in an unknown way: left dense"
    if found.mask is not None:
        return "two masks are laid over the scores: left dense"
    return replace(found, mask=mask, hides=hides)
