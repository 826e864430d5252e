"""Explicit unpack nodes for every use of a packed input that attends to dense tensors.

    keys = cat([packed, k], -2)            past = unpack(side, lengths, length)
    o = sdpa(q, keys, ...)           ->    keys = cat([past, k], -2)
    return o, keys                         o = sdpa(q, keys, ...)
                                           return o, k       + the runtime extends the handle by k

A packed input that the graph writes to is returned as well, and takes that content over.

One layer's dense tensor lives as long as its own attention. Runs after ``rewrite_attend``, whose
cats are gone unless something else reads them.
"""

from __future__ import annotations

import torch

from .base import PassReport
from .draft import BEFORE, Draft, ExtendedOutput
from .find_updates import CacheUpdate
from .find_writes import is_written


def rewrite_unpack(draft: Draft) -> PassReport:
    """Unpack wherever a packed input is still used; the runtime extends those that grow."""
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


def _extend(draft: Draft, update: CacheUpdate) -> None:
    number = draft.number(update.past)
    new = draft.map[update.new]
    draft.result(update.node, lambda number_of: ExtendedOutput(number, number_of(new)))
