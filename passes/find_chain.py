"""Find attention that is written out: two products and a softmax.

    s = matmul(q, repeat_kv(k).transpose(2, 3)) * scale       or / a number; or q scaled before
        einsum("bhqd,bhkd->bhqk", q, repeat_kv(k)) * scale
        baddbmm(bias, q, k.transpose(1, 2), beta=beta, alpha=scale)      heads side by side, or bmm
    s = tanh(s / cap) * cap                                   or none (softcap)
    s = s + mask                                              or masked_fill(m, -inf), where(m, s, -inf);
                                                              several, and scaled behind
    p = dropout(softmax(s, -1, float32).to(q.dtype), 0.0)     casts and an idle dropout, or none
    o = matmul(p, repeat_kv(v))

What a mask hides, hides the same whether -inf or a very negative number stands for it. Sinks
among the scores are read by ``sinks.py``. Between the products heads may lie side by side with
sequences (``regroup.py``), at every step or at some.
"""  # noqa: E501

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .base import argument, calls, shape_of, value_of
from .find_writes import is_written, writes, written_between
from .mask import OTHER_MASK, Mask, MaskPart, mask_part
from .products import is_baddbmm, scores_of, weighted
from .regroup import VIEWS, regrouped
from .sinks import cuts_last, joined, logits, without_max
from .views import in_one_order, is_cast

_SOFTMAX = ("softmax", torch.softmax, F.softmax)
_MUL = ("mul", "mul_", torch.mul, operator.mul, operator.imul)
_DIV = ("div", "div_", torch.div, operator.truediv, operator.itruediv)
_ADD = ("add", "add_", torch.add, operator.add, operator.iadd)

HIDDEN = -1e4
"""A number added to, or put in the place of, scores of tokens that are not seen is no greater."""

STILL_HIDDEN = -100.0
"""Nor is this what becomes of it if it is scaled with the scores: its weight is 0 in float32."""


@dataclass(frozen=True)
class Chain:
    """Attention as it is written out.

    Attributes:
        node: the last product, ``[B, Hq, Q, Dv]`` or ``[B * Hq, Q, Dv]``.
        q: queries, of either shape.
        k, v: operands of the products, of either shape, keys not transposed.
        mask: what is laid over the scores, or None.
        scale: factor of the product of queries and keys.
        softcap: what scores are capped at before the mask is laid over them; 0: they are not.
        sinks: one score more for each query head, in any shape, or None.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: Mask | None
    scale: float
    softcap: float
    sinks: fx.Node | None


@dataclass(frozen=True)
class _Scores:
    """What a softmax is taken of: ``cap tanh(scale q.k)``, or ``scale q.k`` where cap is 0.

    ``product`` is that of q and k, ``views`` are those on the way from it to the softmax. The
    largest number that stands in the place of a hidden score is ``hidden``.
    """

    product: fx.Node
    q: fx.Node
    k: fx.Node
    mask: Mask | None = None
    views: tuple[fx.Node, ...] = ()
    scale: float = 1.0
    cap: float = 0.0
    hidden: float = -math.inf


_Found = _Scores | str | None
"""What scores are made of; or of what unsupported form they are; or that they are none."""

_OTHER_ORDER = "attention written out over other than [B, heads, queries, keys]: left dense"


def find_chain(softmax: fx.Node) -> Chain | str | None:
    """The attention around a softmax, or why it is none that is known; None: no attention."""
    if not calls(softmax, *_SOFTMAX):
        return None
    node, path = _product_above(softmax)
    if node is None:
        return None
    shape = shape_of(softmax)
    views = tuple(step for step in path if calls(step, *VIEWS))
    if shape is None or len(shape) not in (3, 4) or not all(map(regrouped, views)):
        return _OTHER_ORDER
    if argument(softmax, 1, "dim") not in (-1, len(shape) - 1):
        return "the softmax is not over keys: left dense"
    if any("out" in step.kwargs for step in (*path, node)):
        return "attention weights are written to a given tensor: left dense"
    if any(len(step.users) > 1 for step in path):
        return "attention weights are used by more than the values: left dense"
    v = weighted(node)[1]
    top, reader, sinks = argument(softmax, 0, "input"), softmax, None
    cuts = [step for step in path if calls(step, operator.getitem)]
    if without_max(top) is not top:
        top, reader = without_max(top), top
    if joined(top):
        (top, column), reader = joined(top) or (None, None), top
        sinks = logits(column, shape[1]) if len(shape) == 4 else None
        if sinks is None or len(cuts) != 1 or not cuts_last(cuts[0]):
            return "sinks among the scores in an unknown form: left dense"
    elif cuts:
        return "attention weights are cut behind the softmax: left dense"
    scores = _scores(top, reader)
    if isinstance(scores, str):
        return scores
    if scores is None or not isinstance(v, fx.Node):
        return "attention written out in an unknown form: left dense"
    if not in_one_order(scores.q, scores.k, v, (*scores.views, softmax, *views, node)):
        return _OTHER_ORDER
    laid = () if scores.mask is None else tuple(part.node for part in scores.mask.parts)
    read = (scores.q, *laid, *(() if sinks is None else (sinks,)))
    if any(written_between(x, scores.product, node) for x in read):
        return "queries, masks or sinks change before the values are read: left dense"
    scale = scores.scale * (scores.cap or 1.0)  # cap tanh(scale q.k / cap)
    cap = abs(scores.cap)  # tanh is odd
    return Chain(node, scores.q, scores.k, v, scores.mask, scale, cap, sinks)


def _product_above(softmax: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """The product with the values, if there is one, and all weights that lead to it."""
    path = [softmax]
    while True:
        following = None
        for user in path[-1].users:
            if weighted(user)[0] is path[-1]:
                return user, path
            passed = calls(user, "contiguous", operator.getitem, *VIEWS)
            if passed or is_cast(user) or _is_idle_dropout(user):
                following = user
        if following is None:
            return None, path
        path.append(following)


def _is_idle_dropout(node: fx.Node) -> bool:
    if not calls(node, F.dropout, torch.dropout):
        return False
    chance, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
    training = argument(node, 2, "train", training)
    return chance == 0.0 or training is False


def _scores(node: Any, reader: fx.Node) -> _Found:
    """What ``node``, as ``reader`` reads it, is made of."""
    if not isinstance(node, fx.Node) or "out" in node.kwargs:
        return None
    if any(user is not reader and writes(user, node) for user in node.users):
        return "scores are written to in place: left dense"
    if is_cast(node) or calls(node, "contiguous"):
        return _scores(argument(node, 0, "input"), node)
    if regrouped(node) is not None:
        found = _scores(regrouped(node), node)
        return replace(found, views=(*found.views, node)) if isinstance(found, _Scores) else found
    operands = scores_of(node)
    if operands is not None:
        product = _Scores(node, *operands)
        return _with_input(product, node) if is_baddbmm(node) else product
    if calls(node, *_MUL, *_DIV):
        return _scaled(node)
    if calls(node, *_ADD):
        return _added(node)
    if calls(node, "masked_fill", "masked_fill_", torch.masked_fill):
        scores, mask, value = (argument(node, i, n) for i, n in enumerate(("", "mask", "value")))
        return _hidden(_scores(scores, node), scores, mask, value, True)
    if calls(node, torch.where):
        names = ("condition", "input", "other")
        seen, scores, value = (argument(node, i, name) for i, name in enumerate(names))
        return _hidden(_scores(scores, node), scores, seen, value, False)
    if calls(node, "tanh", torch.tanh):
        return _capped(_scores(argument(node, 0, "input"), node))
    return None


def _with_input(found: _Scores, node: fx.Node) -> _Found:
    """``beta * input + alpha * q @ k^T``; where beta is 0, the input may hold anything."""
    alpha, beta = (_number(node.kwargs.get(name, 1)) for name in ("alpha", "beta"))
    if not alpha or beta is None:
        return None
    found, bias = replace(found, scale=alpha), argument(node, 0, "input")
    if beta == 0 or (calls(bias, torch.zeros) and not is_written(bias)):
        return found
    return _laid(found, node, bias, factor=beta)


def _scaled(node: fx.Node) -> _Found:
    first, second = argument(node, 0, "input"), argument(node, 1, "other")
    if calls(node, *_MUL) and _number(first) is not None:
        first, second = second, first
    factor = _number(second)
    if not factor or node.kwargs.get("rounding_mode"):
        return None
    found = _scores(first, node)
    if not isinstance(found, _Scores):
        return found
    factor = 1 / factor if calls(node, *_DIV) else factor
    mask = None if found.mask is None else found.mask.scaled(factor)
    if found.mask is not None and mask is None:
        return "the mask is turned round with the scores: left dense"
    found = replace(found, mask=mask, hidden=found.hidden * abs(factor))
    if found.hidden > STILL_HIDDEN:
        return "hidden scores are scaled until they are seen: left dense"
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
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.dim():
            return "a number is added to all scores: left dense"
        return _laid(found, scores, mask)
    return None


def _laid(found: _Scores, scores: fx.Node, mask: Any, factor: float = 1.0) -> _Found:
    """Scores with a mask of numbers more."""
    value = value_of(mask)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return "what is added to the scores is no mask of numbers: left dense"
    return _under(found, mask_part(mask, shape_of(scores) or ()), factor)


def _under(found: _Scores, part: MaskPart | None, factor: float = 1.0) -> _Found:
    if part is None:
        return OTHER_MASK
    part = replace(part, factor=factor)
    return replace(found, mask=Mask((part,)) if found.mask is None else found.mask + part)


def _hidden(found: _Found, scores: Any, mask: Any, value: Any, hides: bool) -> _Found:
    if not isinstance(found, _Scores):
        return found
    value, shown = _number(value), value_of(mask)
    if value is None or value > HIDDEN or not isinstance(shown, torch.Tensor):
        return "tokens are hidden in an unknown way: left dense"
    if not shown.dim() or shown.dtype != torch.bool:
        return "tokens are hidden in an unknown way: left dense"
    found = replace(found, hidden=max(found.hidden, value))
    faint = value > -math.inf
    return _under(found, mask_part(mask, shape_of(scores) or (), hides, faint))
