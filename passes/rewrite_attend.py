"""Attention on codes.

    keys = cat([packed, k], -2)                     append_(ring_k, k, lengths)
    values = cat([packed_1, v], -2)           ->    append_(ring_v, v, lengths)
    o = sdpa(q, repeat_kv(keys), ...)               o = attend(q, mask, side_k, side_v, ...)
    return o, keys, values                          return o      + handles grown by the runtime

``append_`` stands where the cat stood; a cache that does not grow (cross-attention) has none. Where
bits of later tokens go by attention (``tiers``), the first site that reads a cache also weighs the
tokens of its ring:

    update_importance_(importance_v, q, score_bias(mask, ...), ring_k, ...)

Views and casts between cache and attention vanish with their last user, and so does a softmax that
is written out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..codec import parse_layout
from .base import PassReport, same_size, shape_of, value_of
from .draft import AFTER, AppendedOutput, Draft
from .find_attention import AttentionSite
from .find_updates import CacheUpdate


def rewrite_attend(draft: Draft) -> PassReport:
    """Rewrite every site that the plan wants attended on codes."""
    sites = draft.plan.having("attend")
    appended: set[fx.Node] = set()
    biases: dict[Any, fx.Node] = {}
    for planned in sites:
        cached, site = planned.cached, planned.cached.site
        weighed: list[int] = []
        for update in (cached.k, cached.v):
            if update.kind == "packed" and update.node not in appended:
                appended.add(update.node)
                _append(draft, update)
                number = draft.number(update.past)
                weighed += [number] * parse_layout(draft.layouts[number]).tracks_importance
        k, v = draft.number(cached.k.past), draft.number(cached.v.past)
        old = draft.map[site.node]
        with draft.graph.inserting_before(old):
            q, mask, lengths = draft.queries(site), draft.mask(site), draft.lengths(k, AFTER)
            more = more_of(draft, site)
            for number in weighed:
                bias = _ring_bias(draft, mask, k, lengths, value_of(site.q).dtype, biases)
                draft.graph.call_function(
                    torch.ops.apack.update_importance_.default,
                    (draft.importance(number), q, bias, draft.ring(k), lengths, site.scale, *more),
                )
            new = draft.graph.call_function(
                torch.ops.apack.attend.default,
                (q, mask, draft.side(k), draft.side(v), lengths, site.scale, draft.layouts[k],
                 draft.layouts[v], *more),
            )  # fmt: skip
        put_in_place(draft, site, new)
    return PassReport("rewrite_attend", len(sites))


def _ring_bias(
    draft: Draft, mask: fx.Node | None, number: int, lengths: fx.Node, dtype: torch.dtype,
    made: dict[Any, fx.Node],
) -> fx.Node:  # fmt: skip
    """What is added to scores over the ring of a packed input; once for layers that share it."""
    ring = draft.ring(number)
    key = mask, lengths, dtype  # packed inputs with common lengths have rings of one size
    if key not in made:
        call = draft.graph.call_function
        slots = call(torch.ops.aten.sym_size.int, (ring, 2))
        made[key] = call(torch.ops.apack.score_bias.default, (mask, lengths, 0, slots, dtype))
    return made[key]


def put_in_place(draft: Draft, site: AttentionSite, new: fx.Node) -> None:
    """Let ``new``, an attention ``[B, Hq, Q, D]`` just in front of the site's own, stand for it."""
    old = draft.map[site.node]
    with draft.graph.inserting_before(old):
        wanted, given = value_of(site.node), value_of(site.q)
        if wanted.dtype != given.dtype:  # written out: as the weights were cast
            new = draft.graph.call_function(torch.ops.aten.to.dtype, (new, wanted.dtype))
        if _lies_by_token(wanted):
            new = _by_token(draft, new)
        if wanted.dim() == 3:
            new = draft.graph.call_function(torch.ops.aten.flatten.using_ints, (new, 0, 1))
    new.meta = dict(old.meta)
    operands = list(old.all_input_nodes)
    old.replace_all_uses_with(new)
    draft.replace(site.node, new)
    draft.graph.erase_node(old)
    for operand in operands:
        _erase_dead(draft, operand, keep=(draft.map[site.k], draft.map[site.v]))


def _lies_by_token(value: torch.Tensor) -> bool:
    """Whether ``[B, H, Q, D]`` lies in memory as ``[B, Q, H, D]``, as SDPA gives it.

    Models may rely on that: ``y.transpose(1, 2).view(B, Q, H * D)``.
    """
    if value.dim() != 4 or same_size(value.shape[2], 1):
        return False
    _, heads, _, dim = value.shape
    lies = zip(value.stride()[1:], (dim, heads * dim, 1), strict=True)
    return all(same_size(stride, size) for stride, size in lies)


def _by_token(draft: Draft, node: fx.Node) -> fx.Node:
    """``node [B, H, Q, D]`` laid out so."""
    aten, call = torch.ops.aten, draft.graph.call_function
    laid = call(aten.contiguous.default, (call(aten.transpose.int, (node, 1, 2)),))
    return call(aten.transpose.int, (laid, 1, 2))


def more_of(draft: Draft, site: AttentionSite) -> tuple[float | fx.Node, ...]:
    """Arguments of ``attend`` and ``importance`` that most sites do without."""
    if site.sinks is None:
        return (site.softcap,) if site.softcap else ()
    sinks = draft.map[site.sinks]
    if len(shape_of(site.sinks) or ()) != 1:
        sinks = draft.graph.call_function(torch.ops.aten.reshape.default, (sinks, [-1]))
    return site.softcap, sinks


def _append(draft: Draft, update: CacheUpdate) -> None:
    number = draft.number(update.past)
    draft.appends[number] = draft.plan.appended[number]
    with draft.graph.inserting_before(draft.map[update.node]):
        draft.graph.call_function(
            torch.ops.apack.append_.default,
            (draft.ring(number), draft.map[update.new], draft.lengths(number, AFTER)),
        )
    draft.result(update.node, lambda _: AppendedOutput(number))


def _erase_dead(draft: Draft, node: fx.Node, keep: tuple[fx.Node, ...]) -> None:
    """Erase ``node`` and what it alone used, up to ``keep``: what lost its last user."""
    todo, erased = [node], set[fx.Node]()
    while todo:
        node = todo.pop()
        sources = node.all_input_nodes
        if node in erased or node in keep or draft.is_live(node):
            continue
        if node.op == "placeholder" or not sources or node.is_impure():
            continue
        draft.graph.erase_node(node)
        erased.add(node)
        todo += sources
