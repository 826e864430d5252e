"""Decide what becomes of each cached site in a graph.

==========  =========================  ===========================================================
past        new tokens                 treatment
==========  =========================  ===========================================================
packed      1 to 16                    ``attend``: append to the ring, attention on codes
packed      none, 1 to 16 queries      ``attend``: attention on codes (cross-attention)
packed      otherwise                  ``unpack``: dense attention of this layer, runtime appends
dense, none any                        ``encode``: dense attention, the result leaves packed
==========  =========================  ===========================================================

A packed input that no site accounts for is unpacked where it is used. Where Dynamo has a symbol for
a small number of new tokens (assisted decoding), a guard holds it to its value: each number has a
graph of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..cache import PackedKV
from .ancestry import holds_tensors
from .base import PassReport, Skip, shape_of, value_of
from .find_attention import find_attention
from .find_strays import find_strays
from .find_updates import CachedSite, CacheUpdate, find_updates
from .find_writes import is_written

MAX_QUERIES = 16
"""Most new tokens for which attention on codes is used."""

Treatment = Literal["attend", "unpack", "encode"]


@dataclass(frozen=True)
class PlannedSite:
    """A cached site and what to do with it."""

    cached: CachedSite
    treatment: Treatment


@dataclass(frozen=True)
class Plan:
    """What to do with one graph.

    Attributes:
        sites: the cached sites, in order.
        handles: placeholders that are packed inputs, in order.
        reports: of the passes that led here.
    """

    sites: tuple[PlannedSite, ...]
    handles: tuple[fx.Node, ...]
    reports: tuple[PassReport, ...]

    @property
    def updates(self) -> tuple[CacheUpdate, ...]:
        """Every cache update once, in order."""
        every = (u for planned in self.sites for u in (planned.cached.k, planned.cached.v))
        return tuple({u.node: u for u in every}.values())

    def having(self, treatment: Treatment) -> tuple[PlannedSite, ...]:
        """The sites with this treatment."""
        return tuple(s for s in self.sites if s.treatment == treatment)

    @property
    def appended(self) -> tuple[int, ...]:
        """For each packed input, the tokens that ``attend`` sites write into its ring."""
        tokens = dict.fromkeys(self.handles, 0)
        for planned in self.having("attend"):
            for update in (planned.cached.k, planned.cached.v):
                shape = shape_of(update.new)
                if update.kind == "packed":
                    assert shape is not None and update.past is not None
                    tokens[update.past] = shape[2]
        return tuple(tokens.values())

    @property
    def fixed(self) -> tuple[bool, ...]:
        """For each packed input, whether ``attend`` sites read it as it is."""
        read = {u.past for s in self.having("attend") for u in (s.cached.k, s.cached.v)}
        return tuple(h in read and not n for h, n in zip(self.handles, self.appended, strict=True))

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """Everything left alone, and why."""
        return tuple(skip for report in self.reports for skip in report.skipped)


def make_plan(graph: fx.Graph) -> Plan:
    """Find the sites of ``graph`` and decide.

    Nothing is changed, but that guards may be added for the number of new tokens.
    """
    attention, first = find_attention(graph)
    cached, second = find_updates(graph, attention)
    known = (*(site.node.name for site in attention), *(skip.where for skip in first.skipped))
    third = find_strays(graph, known)
    planned: list[PlannedSite] = []
    skipped: list[Skip] = []
    strict = _has_marked_sizes()
    growths: dict[fx.Node | None, set[fx.Node]] = {}
    for site in cached:
        for update in (site.k, site.v):
            growths.setdefault(update.past, set()).add(update.node)
    for site in cached:
        treatment, reason = _treat(site, strict)
        if treatment == "attend" and any(len(growths[u.past]) > 1 for u in (site.k, site.v)):
            treatment = "unpack"
            reason = "the cache grows in two ways at once: dense attention"
        planned.append(PlannedSite(site, treatment))
        if reason is not None:
            skipped.append(Skip(site.site.node.name, reason))
    handles = tuple(
        n for n in graph.nodes if n.op == "placeholder" and isinstance(value_of(n), PackedKV)
    )
    grown = {site.k.past for site in cached} | {site.v.past for site in cached}
    skipped += [
        Skip(h.name, "a packed input that no attention here grows: unpacked")
        for h in handles
        if h not in grown and any(holds_tensors(value_of(user)) for user in h.users)
    ]  # of others sizes are read, if anything
    report = PassReport("plan", len(planned), tuple(skipped))
    return Plan(tuple(planned), handles, (first, second, third, report))


def _treat(cached: CachedSite, strict: bool) -> tuple[Treatment, str | None]:
    """The treatment of a site, and why not the better one.

    Args:
        cached: the site.
        strict: whether symbols must not be held to a value.
    """
    fixed = cached.k.kind == "fixed"
    if cached.k.kind != "packed" and not fixed:
        return "encode", None
    if any(u.past is not None and is_written(u.past) for u in (cached.k, cached.v)):
        return "unpack", "the graph writes to the packed cache in place: dense from here on"
    shape = shape_of(cached.site.q if fixed else cached.k.new)
    tokens = None if shape is None else shape[-2]
    if isinstance(tokens, torch.SymInt) and not strict and not free_unbacked_symbols(tokens):
        if tokens > MAX_QUERIES:
            return "unpack", f"over {MAX_QUERIES} new tokens on a packed cache: dense attention"
        tokens = int(tokens)
    if not isinstance(tokens, int):
        return "unpack", "the number of new tokens is not known when compiling: dense attention"
    if tokens > MAX_QUERIES:
        return "unpack", f"{tokens} new tokens on a packed cache: dense attention"
    if cached.site.causal and cached.site.mask is None:
        return "unpack", "is_causal on a cache: dense attention"
    q_shape = shape_of(cached.site.q)
    if q_shape is None or q_shape[-2] != tokens:
        return "unpack", "queries and new keys are different in number: dense attention"
    return "attend", None


def _has_marked_sizes() -> bool:
    """Whether the user marked a size of an input as dynamic: to hold it to a value is an error."""
    tracing = TracingContext.try_get()
    contexts = () if tracing is None else tracing.tensor_to_context.values()
    constraints = (c for context in contexts for c in getattr(context, "constraint_sizes", ()))
    return any(c is not None and not getattr(c, "warn_only", False) for c in constraints)
