"""Counters of what ran, for the report: one record for each graph that Dynamo handed us."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..cache.store import SideStore
from ..fitting.layer import LayerProfile
from ..locks import lock
from ..options import Options
from ..passes.base import PassReport, Skip


@dataclass
class GraphRecord:
    """One Dynamo graph.

    Attributes:
        reason: why the graph runs as stock Inductor runs it; empty if it is ours.
        passes: the last report of each pass.
        skipped: sites left alone, and why.
        names: of the layers that are packed here, in order.
        q_heads: query heads of each, by name.
        compiles: Inductor compilations.
        regions: those of packed attention and encoding among the operators, apart from the graph.
        runs: graph runs by what was run: ``stock``, ``fit``, ``encode``, ``decode``.
        attends: packed attention calls.
        notes: of single sites, such as why there is no fit yet.
        stores: caches that this graph made and that are alive.
        options: that the graph was compiled with.
        layers: profiles of the layers that are fitted, by site. Other graphs have the same ones.
        profile: where the codes come from.
        told: what the report was told of the layers last.
        weights: the model's parameters among the inputs.
        anonymous: whether there were none: the graph does not show whose it is.
    """

    reason: str = ""
    passes: dict[str, PassReport] = field(default_factory=dict)
    skipped: tuple[Skip, ...] = ()
    names: tuple[str, ...] = ()
    q_heads: dict[str, int] = field(default_factory=dict)
    compiles: int = 0
    regions: int = 0
    runs: dict[str, int] = field(default_factory=dict)
    attends: int = 0
    notes: dict[str, str] = field(default_factory=dict)
    stores: weakref.WeakSet[SideStore] = field(default_factory=weakref.WeakSet)
    options: Options | None = None
    layers: weakref.WeakValueDictionary[str, LayerProfile] = field(
        default_factory=weakref.WeakValueDictionary
    )
    profile: str = ""
    told: tuple[Any, ...] = ()
    weights: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    anonymous: bool = False

    def same_graph_as(self, other: GraphRecord) -> None:
        """Take over what does not depend on whose graph it is."""
        self.reason, self.passes, self.skipped = other.reason, dict(other.passes), other.skipped
        self.names, self.options = other.names, other.options
        self.q_heads = other.q_heads

    def ran(self, what: str) -> None:
        """Count a run."""
        self.runs[what] = self.runs.get(what, 0) + 1

    def passed(self, reports: Iterable[PassReport]) -> None:
        """Note what passes did."""
        self.passes |= {report.name: report for report in reports}

    def compiled_region(self) -> None:
        """Count the compilation of an operator."""
        self.regions += 1

    def belongs_to(self, parameters: Iterable[Any]) -> None:
        """Remember whose graph this is."""
        for p in parameters:
            if isinstance(p, torch.nn.Parameter):
                self.weights[p] = True
        self.anonymous = not self.weights

    def is_of(self, parameters: Iterable[torch.nn.Parameter]) -> bool:
        """Whether this graph belongs to the model with these parameters.

        Accelerate brings offloaded weights in and out around the graphs, which then show none:
        those with caches count for every model, rather than be left out.
        """
        if self.anonymous:
            return bool(self.names or self.skipped)
        return any(p in self.weights for p in parameters)


class Registry:
    """All records, in the order in which Dynamo made the graphs."""

    def __init__(self) -> None:
        self._lock = lock()
        self._records: list[GraphRecord] = []

    def new(self) -> GraphRecord:
        """A record for a new graph."""
        record = GraphRecord()
        with self._lock:
            self._records.append(record)
        return record

    def all(self) -> tuple[GraphRecord, ...]:
        """Every record."""
        with self._lock:
            return tuple(self._records)

    def clear(self) -> None:
        """Forget the records; graphs that live on keep counting into theirs."""
        with self._lock:
            self._records.clear()


REGISTRY = Registry()
