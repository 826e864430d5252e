"""Find attention that is written out: two products and a softmax.

    s = matmul(q, repeat_kv(k).transpose(2, 3)) * scale       or / a number; or q scaled before;
                                                              tensors the same for all keys, too
        einsum("bhqd,bhkd->bhqk", q, repeat_kv(k)) * scale
        baddbmm(bias, q, k.transpose(1, 2), beta=beta, alpha=scale)      heads side by side, or bmm
    s = tanh(s / cap) * cap                                   or none (softcap)
    s = s + mask                                              or s - mask, masked_fill(m, -inf),
                                                              where(m, s, -inf); several, scaled behind
    p = dropout(softmax(s, -1, float32).to(q.dtype), 0.0)     casts and an idle dropout, or none
    o = matmul(p, repeat_kv(v))

What a mask hides, hides the same whether -inf or a very negative number stands for it. Sinks
among the scores are read by ``sinks.py``. Between the products heads may lie side by side with
sequences (``regroup.py``), at every step or at some.
"""  # noqa: E501

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

from .ancestry import is_made_of
from .base import argument, calls, shape_of
from .factors import Factor
from .find_writes import written_between
from .mask import Mask
from .products import weighted
from .regroup import VIEWS, regrouped
from .scores import find_scores
from .sinks import cuts_last, joined, logits, without_max
from .views import in_one_order, is_cast

_SOFTMAX = ("softmax", torch.softmax, F.softmax)


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
        factors: tensors that the product of queries and keys is multiplied with.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: Mask | None
    scale: float
    softcap: float
    sinks: fx.Node | None
    factors: tuple[Factor, ...] = ()


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
    scores = find_scores(top, reader)
    if isinstance(scores, str):
        return scores
    if scores is None or not isinstance(v, fx.Node):
        return "attention written out in an unknown form: left dense"
    if not in_one_order(scores.q, scores.k, v, (*scores.views, softmax, *views, node)):
        return _OTHER_ORDER
    laid = () if scores.mask is None else tuple(part.node for part in scores.mask.parts)
    laid += tuple(factor.node for factor in scores.factors)
    laid += () if sinks is None else (sinks,)
    if any(is_made_of(x, scores.product) for x in laid):
        return "what is laid over the scores is made of them: left dense"
    if any(written_between(x, scores.product, node) for x in (scores.q, *laid)):
        return "queries, masks or sinks change before the values are read: left dense"
    scale = scores.scale * (scores.cap or 1.0)  # cap tanh(scale q.k / cap)
    cap = abs(scores.cap)  # tanh is odd
    return Chain(node, scores.q, scores.k, v, scores.mask, scale, cap, sinks, scores.factors)


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
