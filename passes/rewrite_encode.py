"""Encode in the graph: the dense cache of a layer dies with its own attention.

    keys = cat([past, k], -2)                  keys = cat([past, k], -2)
    o = sdpa(q, keys, values, mask)      ->    o = sdpa(q, keys, values, mask)
    return o, keys, values                     codes, pool, positions, ring = encode(keys, ...)
                                               return o, codes, pool, ...    + handles made of them

Where a code has planes, ``importance(q, keys, mask, ...)`` stands before it (kernels/planes.py);
where its planes are of kinds of tokens, the graph takes those of the prompt (kernels/kinds.py).

The first prefill of a layer, whose code is not known yet, returns the dense tensors and their
moments instead (``collect``); the runtime fits and packs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import fx

from ..cache import Policy
from ..codec import parse_layout
from ..codec.kinds import KINDS
from ..kernels.encode import results
from .ancestry import as_networkx
from .base import PassReport, same_size, shape_of, value_of
from .draft import ARGUMENTS, SORTED_TOKENS, DenseOutput, Draft, EncodedOutput
from .find_rotation import find_rotation
from .find_updates import CachedSite, CacheUpdate
from .flex_mask import FlexMask
from .mask import Mask
from .plan import PlannedSite
from .rewrite_attend import more_of

TOLD = 6
"""Extra results of :func:`collect` for each site."""

SORTED = 1 + KINDS
"""Tensors that say the tokens of a prompt by kind."""


def encoded_updates(draft_sites: tuple[PlannedSite, ...]) -> tuple[CacheUpdate, ...]:
    """The updates of ``encode`` sites, keys and values in turn, each once."""
    every = (u for s in draft_sites for u in (s.cached.k, s.cached.v))
    return tuple({u.node: u for u in every}.values())


def prompt_sites(sites: tuple[PlannedSite, ...]) -> tuple[PlannedSite, ...]:
    """Of ``encode`` sites those that read the tokens of the prompt that the first one reads.

    Which of these are visual is one question. Cross-attention reads other tokens.
    """
    own = [planned for planned in sites if not planned.cached.crosses]
    return tuple(p for p in own if _same_prompt(p.cached, own[0].cached))


def devices_of(updates: Iterable[CacheUpdate]) -> tuple[torch.device, ...]:
    """Where these are, each once."""
    return tuple(dict.fromkeys(value_of(update.node).device for update in updates))


def rewrite_encode(
    draft: Draft, layouts: tuple[str, ...], policies: tuple[Policy, ...]
) -> PassReport:
    """Encode every update of the ``encode`` sites.

    Args:
        draft: the graph.
        layouts: spec of the code of each update, in the order of :func:`encoded_updates`.
        policies: what stays exact, for each update.
    """
    sites = draft.plan.having("encode")
    seen = _Visible(draft)
    told: dict[fx.Node, fx.Node] = {}
    updates = encoded_updates(sites)
    places, prompts = devices_of(updates), prompt_sites(sites)
    for number, update in enumerate(updates):
        planned = next(s for s in sites if update in (s.cached.k, s.cached.v))
        layout, policy = layouts[number], policies[number]
        visible = seen.of(planned)
        x = draft.map[update.node]
        last = draft.map[planned.cached.site.node]
        importance: fx.Node | None = None
        kinds: list[fx.Node] | None = None
        code = parse_layout(layout)
        if code.weighs:
            site = planned.cached.site.node
            if site not in told:  # keys and values may both ask
                with draft.graph.inserting_before(last.next):
                    told[site] = importance_of(draft, planned)
            last = importance = told[site]
        if code.plane_kinds and planned in prompts:
            place = SORTED * places.index(value_of(update.node).device)
            kinds = [draft.input(SORTED_TOKENS, place + i) for i in range(SORTED)]
        with draft.graph.inserting_after(last):
            call = draft.graph.call_function(
                torch.ops.apack.encode.default,
                (x, visible, draft.code(number, layout), layout, policy.sinks, policy.extra,
                 policy.window, policy.ring, policy.chunk, importance, kinds),
            )  # fmt: skip
        count = results(code)
        pieces = []
        last = call
        for i in range(count):
            with draft.graph.inserting_after(last):
                last = draft.graph.call_function(operator.getitem, (call, i))
            pieces.append(last)
        with draft.graph.inserting_after(last):
            pieces.append(draft.graph.call_function(torch.ops.aten.sym_size.int, (x, 2)))
        _return_pieces(draft, update, number, pieces)
    return PassReport("rewrite_encode", len(updates))


def _return_pieces(draft: Draft, update: CacheUpdate, code: int, pieces: list[fx.Node]) -> None:
    def recipe(number_of: Callable[[fx.Node], int]) -> EncodedOutput:
        numbers = [number_of(piece) for piece in pieces]
        return EncodedOutput(code, numbers[0], len(numbers) - 1)

    draft.result(update.node, recipe)


def importance_of(draft: Draft, planned: PlannedSite) -> fx.Node:
    """How much attention the tokens of a site receive, at the current insertion point.

    Of the last queries, among dense keys (``apack::importance``).
    """
    site = planned.cached.site
    return draft.graph.call_function(
        torch.ops.apack.importance.default,
        (draft.queries(site), draft.map[planned.cached.k.node], draft.mask(site), site.causal,
         site.scale, *more_of(draft, site)),
    )  # fmt: skip


def collect(draft: Draft, sinks: int, visual: bool = False, weigh: bool = False) -> PassReport:
    """Return dense tensors, and behind all results what a fit needs to know of each site.

    The extra results are, for each ``encode`` site: its moments; visible tokens or None; cosines
    and sines of the rotation of its keys, or None; whether it is interleaved; the importance of its
    tokens, or None.

    Args:
        draft: the graph.
        sinks: the first tokens, which do not count.
        visual: whether the new graph takes a mask of visual tokens behind the Dynamo arguments.
            Sites of a first prefill then have a second set of moments: of visual tokens.
        weigh: whether to tell the importance.
    """
    sites = draft.plan.having("encode")
    prompts = prompt_sites(sites)
    flow = as_networkx(draft.gm.graph)
    seen = _Visible(draft)
    updates = encoded_updates(sites)
    for number, update in enumerate(updates):
        draft.result(update.node, partial(_dense_output, number, draft.map[update.node]))
    for planned in sites:
        cached = planned.cached
        visible = seen.of(planned)
        rotation = find_rotation(flow, cached.k.new)
        cos = sin = None
        if rotation is not None:
            cos, sin = draft.map[rotation.cos], draft.map[rotation.sin]
        interleaved = rotation is not None and rotation.interleaved
        kinds = None
        if visual and planned in prompts:
            kinds = draft.input(ARGUMENTS, len(draft.gm.graph.find_nodes(op="placeholder")))
        with draft.graph.inserting_before(draft.map[cached.site.node].next):
            moments = draft.graph.call_function(
                torch.ops.apack.moments.default,
                (draft.queries(cached.site), draft.map[cached.k.node], draft.map[cached.v.node],
                 visible, kinds, cos, sin, interleaved, sinks),
            )  # fmt: skip
            weight = importance_of(draft, planned) if weigh else None
        draft.extra += [moments, visible, cos, sin, interleaved, weight]
    return PassReport("collect", len(sites))


def _same_prompt(a: CachedSite, b: CachedSite) -> bool:
    """Whether keys are of the same number of sequences and tokens, with or without older ones."""
    mine, theirs = shape_of(a.k.node), shape_of(b.k.node)
    assert mine is not None and theirs is not None
    alike = same_size(mine[0], theirs[0]) and same_size(mine[2], theirs[2])
    return alike and (a.k.past is None) == (b.k.past is None)


def _dense_output(code: int, node: fx.Node, number_of: Callable[[fx.Node], int]) -> DenseOutput:
    return DenseOutput(code, number_of(node))


class _Visible:
    """The visible tokens of a mask, computed once for each mask and keys of one shape.

    A mask that is the same for all keys may lie over caches of several lengths.
    """

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.known: dict[tuple[Mask | FlexMask, str], fx.Node] = {}

    def of(self, planned: PlannedSite) -> fx.Node | None:
        site = planned.cached.site
        if site.mask is None:
            return None
        key = site.mask, str(shape_of(planned.cached.k.node))
        if key not in self.known:
            graph = self.draft.graph
            keys = self.draft.map[planned.cached.k.node]
            with graph.inserting_before(self.draft.map[site.node]):
                mask = self.draft.mask(site)
                sizes = [
                    graph.call_function(torch.ops.aten.sym_size.int, (keys, d)) for d in (0, 2)
                ]
                self.known[key] = graph.call_function(
                    torch.ops.apack.visible.default, (mask, *sizes)
                )
        return self.known[key]
