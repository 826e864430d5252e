"""Whose graph is running: Dynamo runs one graph for all models with the same code.

Weights are inputs of a graph, so that models of one class share it. Each model has a record of its
own, found by the first weight among the arguments.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..locks import lock
from .stats import REGISTRY, GraphRecord


class Owners:
    """The records of one graph.

    Args:
        record: of the model that the graph was traced for.
    """

    def __init__(self, record: GraphRecord) -> None:
        self._first = record
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._records = [record]
        self._running = threading.local()
        self._lock = lock()

    @property
    def record(self) -> GraphRecord:
        """Of the model whose graph this thread runs, or ran last."""
        return getattr(self._running, "record", self._first)

    def enter(self, args: Sequence[Any], own: Sequence[Any] = ()) -> None:
        """A run begins.

        Args:
            args: arguments of the graph.
            own: parameters that it holds itself.
        """
        weight = next((a for a in args if isinstance(a, nn.Parameter)), None)
        if weight is None:
            if not self._first.runs:
                self._first.belongs_to(own)
            return
        record = self._known.get(weight)
        if record is None:
            with self._lock:
                record = self._known[weight] = self._known.get(weight) or self._new(args, own)
        self._running.record = record

    def _new(self, args: Sequence[Any], own: Sequence[Any]) -> GraphRecord:
        # Offloaded weights are made anew for every run: those of the run before are gone.
        record = next((r for r in self._records if not r.weights), None)
        if record is None:
            record = REGISTRY.new()
            record.same_graph_as(self._first)
            self._records.append(record)
        record.belongs_to((*args, *own))
        return record
