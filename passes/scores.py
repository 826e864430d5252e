"""Read what a softmax is taken of, from it up to the product of queries and keys.

    softmax(where(seen, tanh(q @ k^T * t / cap) * cap + bias, -inf))
        ->  Scores(product, q, k, mask=Mask(bias, seen), scale=1 / cap, cap=cap, factors=(t,))

Each form is a function that asks for the scores below it and adds what it does to them.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..cache import PackedKV
from .base import argument, calls, output_of, shape_of, value_of
from .constants import filled_with, number
from .factors import Factor, factor_of
from .find_writes import is_written, writes
from .mask import OTHER_MASK, Mask, MaskPart, mask_part
from .products import is_baddbmm, scores_of
from .regroup import regrouped
from .views import is_cast, walk_up

_MUL = ("mul", "mul_", "multiply", torch.mul, torch.multiply, operator.mul, operator.imul)
_DIV = ("div", "div_", "divide", "true_divide", torch.div, torch.divide, torch.true_divide,
        operator.truediv, operator.itruediv)  # fmt: skip
_ADD = ("add", "add_", torch.add, operator.add, operator.iadd)
_SUB = ("sub", "sub_", "subtract", torch.sub, torch.subtract, operator.sub, operator.isub)

HIDDEN = -1e4
"""A number added to, or put in the place of, scores of tokens that are not seen is no greater."""

STILL_HIDDEN = -100.0
"""Nor is this what becomes of it if it is scaled with the scores: its weight is 0 in float32."""


@dataclass(frozen=True)
class Scores:
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
    factors: tuple[Factor, ...] = ()


Found = Scores | str | None
"""What scores are made of; or of what unsupported form they are; or that they are none."""


def find_scores(node: Any, reader: fx.Node) -> Found:
    """What ``node``, as ``reader`` reads it, is made of; or why not; None: of no scores."""
    if not isinstance(node, fx.Node) or "out" in node.kwargs:
        return None
    if any(user is not reader and writes(user, node) for user in node.users):
        return "scores are written to in place: left dense"
    if is_cast(node) or calls(node, "contiguous"):
        return find_scores(argument(node, 0, "input"), node)
    if regrouped(node) is not None:
        found = find_scores(regrouped(node), node)
        return replace(found, views=(*found.views, node)) if isinstance(found, Scores) else found
    operands = scores_of(node)
    if operands is not None:
        product = Scores(node, *operands)
        return _with_input(product, node) if is_baddbmm(node) else product
    if calls(node, *_MUL, *_DIV):
        return _scaled(node)
    if calls(node, *_ADD, *_SUB):
        return _added(node)
    if calls(node, "masked_fill", "masked_fill_", torch.masked_fill):
        scores, mask, value = (argument(node, i, n) for i, n in enumerate(("", "mask", "value")))
        return _hidden(find_scores(scores, node), scores, mask, value, True)
    if calls(node, torch.where, "where"):
        return _chosen(node)
    if calls(node, "tanh", torch.tanh):
        return _capped(find_scores(argument(node, 0, "input"), node))
    return None


def _with_input(found: Scores, node: fx.Node) -> Found:
    """``beta * input + alpha * q @ k^T``; where beta is 0, the input may hold anything."""
    alpha, beta = (number(node.kwargs.get(name, 1)) for name in ("alpha", "beta"))
    if not alpha or beta is None:
        return None
    found, bias = replace(found, scale=alpha), argument(node, 0, "input")
    if beta == 0 or (calls(bias, torch.zeros) and not is_written(bias)):
        return found
    return _laid(found, node, bias, factor=beta)


def _scaled(node: fx.Node) -> Found:
    first, second = argument(node, 0, "input"), argument(node, 1, "other")
    if node.kwargs.get("rounding_mode"):
        return None
    if calls(node, *_MUL) and number(first) is not None:
        first, second = second, first
    factor = number(second)
    if factor is None and isinstance(second, fx.Node):
        return _times(node, first, second)
    if not factor:
        return None
    found = find_scores(first, node)
    if not isinstance(found, Scores):
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


def _times(node: fx.Node, first: Any, second: Any) -> Found:
    """Scores times a tensor or a number that varies, in either order, or over it."""
    found, scores, factor = _told_apart(node, first, second, calls(node, *_MUL))
    if not isinstance(found, Scores):
        return found
    if found.mask is not None or found.cap:
        return "masked or capped scores are multiplied by what is no constant: left dense"
    known = factor_of(factor, shape_of(scores) or (), calls(node, *_DIV))
    if isinstance(known, str):
        return known
    return replace(found, factors=(*found.factors, known))


def _told_apart(node: fx.Node, first: Any, second: Any, either: bool) -> tuple[Found, Any, Any]:
    """What the operand is made of that is scores, that operand, and the other one.

    Both may be products of queries: with keys, and with a table of positions. Then it is the one
    whose keys are stored.
    """
    orders = ((first, second), (second, first)) if either else ((first, second),)
    every = [(find_scores(scores, node), scores, other) for scores, other in orders]
    known = [(found, *rest) for found, *rest in every if found is not None]
    kept = (one for one in known if isinstance(one[0], Scores) and _is_stored(one[0].k))
    return next(kept, known[0] if known else (None, first, second))


def _is_stored(keys: fx.Node) -> bool:
    root = walk_up(keys)
    return isinstance(value_of(root), PackedKV) or root in output_of(root.graph).all_input_nodes


def _capped(found: Found) -> Found:
    if not isinstance(found, Scores):
        return found
    if found.mask is not None:
        return "the mask is capped with the scores: left dense"
    if found.cap:
        return "scores are capped twice: left dense"
    return replace(found, cap=1.0)


def _added(node: fx.Node) -> Found:
    first, second = argument(node, 0, "input"), argument(node, 1, "other")
    if node.kwargs.get("alpha", 1) != 1:
        return None
    less = calls(node, *_SUB)
    found, scores, mask = _told_apart(node, first, second, not less)
    if not isinstance(found, Scores):
        return found
    value = value_of(mask)
    if not isinstance(value, torch.Tensor) or not value.dim():
        return "a number is added to all scores: left dense"
    return _laid(found, scores, mask, -1.0 if less else 1.0)


def _laid(found: Scores, scores: fx.Node, mask: Any, factor: float = 1.0) -> Found:
    """Scores with a mask of numbers more."""
    value = value_of(mask)
    if not isinstance(value, torch.Tensor) or value.dtype == torch.bool:
        return "what is added to the scores is no mask of numbers: left dense"
    return _under(found, mask_part(mask, shape_of(scores) or ()), factor)


def _under(found: Scores, part: MaskPart | None, factor: float = 1.0) -> Found:
    if part is None:
        return OTHER_MASK
    part = replace(part, factor=factor)
    return replace(found, mask=Mask((part,)) if found.mask is None else found.mask + part)


def _chosen(node: fx.Node) -> Found:
    """``where(seen, scores, number)`` or ``where(hides, number, scores)``."""
    names = ("condition", "input", "other")
    seen, first, second = (argument(node, i, name) for i, name in enumerate(names))
    if node.op == "call_method":
        first, seen = node.args[0], argument(node, 1, "condition")
    found = find_scores(first, node)
    if found is None:
        return _hidden(find_scores(second, node), second, seen, first, True)
    return _hidden(found, first, seen, second, False)


def _hidden(found: Found, scores: Any, mask: Any, value: Any, hides: bool) -> Found:
    if not isinstance(found, Scores):
        return found
    sizes, shown, tensor = shape_of(scores) or (), value_of(mask), isinstance(value, fx.Node)
    if tensor and shape_of(value) is not None and mask_part(value, sizes) is None:
        return OTHER_MASK
    value = filled_with(value)
    if value is None or value > HIDDEN or not isinstance(shown, torch.Tensor):
        return "tokens are hidden in an unknown way: left dense"
    if not shown.dim() or shown.dtype != torch.bool:
        return "tokens are hidden in an unknown way: left dense"
    found = replace(found, hidden=max(found.hidden, value))
    return _under(found, mask_part(mask, sizes, hides, value > -math.inf))
