"""Explicit unpack nodes for every use of a packed input that attends to dense tensors.

    keys = cat([packed, k], -2)            past = unpack(side, lengths, length)
    o = sdpa(q, keys, ...)           ->    keys = cat([past, k], -2)
    return o, keys                         o = sdpa(q, keys, ...)
                                           return o, k       + the runtime extends the handle by k

Where later tokens have bits by the attention that they receive, ``importance(q, keys, ...)`` is
returned with k.

A packed input that the graph writes to is returned as well, and takes that content over.

Where tokens of the packed input were dropped, attention hides them:

    o = sdpa(q, repeat_kv(keys), ...)      there = present(side_k, side_v, ...)
                                     ->    o = attend_dense(q, keys, values, mask, there, ...)

One layer's dense tensor lives as long as its own attention. Runs after ``rewrite_attend``, whose
cats are gone unless something else reads them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from ..codec import parse_layout
from .base import PassReport
from .draft import BEFORE, Draft, ExtendedOutput
from .find_updates import CacheUpdate
from .find_writes import is_written
from .rewrite_attend import more_of, put_in_place
from .rewrite_encode import importance_of


def rewrite_unpack(draft: Draft) -> PassReport:
    """Unpack wherever a packed input is still used; the runtime extends those that grow."""
    _hide_dropped(draft)
    draft.erase_dead_sizes()
    for update in draft.plan.updates:
        if update.kind != "packed" or is_written(update.past):
            continue
        if not draft.appends[draft.number(update.past)]:
            _extend(draft, update)
        if not draft.is_live(draft.map[update.node]):
            draft.graph.erase_node(draft.map[update.node])
    unpacked = 0
    for handle in draft.plan.handles:
        node = draft.map[handle]
        if not node.users:
            continue
        number = draft.number(handle)
        with draft.graph.inserting_before(draft.first_user(node)):
            dense = draft.graph.call_function(
                torch.ops.apack.unpack.default,
                (
                    draft.side(number),
                    draft.lengths(number, BEFORE),
                    draft.length(number),
                    draft.layouts[number],
                ),
            )
        if is_written(node):
            draft.written[number] = dense
        node.replace_all_uses_with(dense)
        unpacked += 1
    return PassReport("rewrite_unpack", unpacked)


def _hide_dropped(draft: Draft) -> None:
    """Attention of ``unpack`` sites without the tokens that were dropped."""
    for planned in draft.plan.having("unpack"):
        cached, site = planned.cached, planned.cached.site
        if cached.k.past not in draft.plan.handles or cached.v.past not in draft.plan.handles:
            continue
        k, v = draft.number(cached.k.past), draft.number(cached.v.past)
        if not any(parse_layout(draft.layouts[n]).evicts for n in (k, v)):
            continue
        call = draft.graph.call_function
        with draft.graph.inserting_before(draft.map[site.node]):
            sides = (draft.side(k), draft.side(v))
            there = call(
                torch.ops.apack.present.default,
                (*sides, draft.lengths(k, BEFORE), draft.length(k), draft.layouts[k],
                 draft.layouts[v]),
            )  # fmt: skip
            new = call(
                torch.ops.apack.attend_dense.default,
                (draft.queries(site), draft.map[cached.k.node], draft.map[cached.v.node],
                 draft.mask(site), there, site.causal, site.scale, *more_of(draft, site)),
            )  # fmt: skip
        put_in_place(draft, site, new)


def _extend(draft: Draft, update: CacheUpdate) -> None:
    number = draft.number(update.past)
    new, weight = draft.map[update.new], None
    if parse_layout(draft.layouts[number]).tracks_importance:
        sites = draft.plan.having("unpack")
        planned = next(s for s in sites if update in (s.cached.k, s.cached.v))
        with draft.graph.inserting_before(draft.map[planned.cached.site.node].next):
            weight = importance_of(draft, planned)

    def recipe(number_of: Callable[[fx.Node], int]) -> ExtendedOutput:
        known = None if weight is None else number_of(weight)
        return ExtendedOutput(number, number_of(new), known)

    draft.result(update.node, recipe)
