"""Fitted codes by layer: learned from the first real prefill, kept for the process.

A layer is named by the projection weight that its new keys are made with, so that every graph
that Dynamo traces of a model (other lengths, other batches) finds the same codes. A weight that
has changed since (an optimiser step) is another layer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .cache.store import exact_ref
from .codec import CodeRef
from .codec.fit import fit_transform
from .codec.moments import Moments
from .options import Options

log = logging.getLogger(__name__)


class LayerProfile:
    """What is known of one layer under one set of options.

    Attributes:
        moments: sums over the prefills seen so far; None once fitted.
        codes: refs for keys and values once there is a fit.
        reason: why there is none yet, for the report.
    """

    def __init__(self) -> None:
        self.moments: Moments | None = None
        self.codes: tuple[CodeRef, CodeRef] | None = None
        self.reason = "no prefill seen yet"

    def learn(self, moments: Moments, dims: tuple[int, int], options: Options) -> None:
        """Add a prefill's moments, and fit when enough tokens have been seen."""
        self.moments = moments if self.moments is None else self.moments + moments
        count = int(self.moments.count)
        wanted = options.fit_tokens or min(4 * self.moments.k_sum.numel(), 1024)
        if count < wanted:
            self.reason = f"{count} of {wanted} tokens seen that a fit wants: packed exactly"
            return
        try:
            k, v = fit_transform(self.moments, *dims, options.ratio)
        except ValueError as error:
            self.codes = (exact_ref(_heads(self.moments, dims[0]), dims[0]),
                          exact_ref(_heads(self.moments, dims[0]), dims[1]))  # fmt: skip
            self.reason = f"{error}: packed exactly"
            log.warning("attentionpack: %s", self.reason)
        else:
            self.codes = (CodeRef(k), CodeRef(v))
            self.reason = ""
        self.moments = None


def _heads(moments: Moments, dim: int) -> int:
    return moments.k_sum.numel() // dim


class Profiles:
    """All layer profiles of the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_weight: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._by_owner: WeakKeyDictionary[Any, dict[Any, LayerProfile]] = WeakKeyDictionary()

    def layer(self, weight: Tensor | None, owner: Any, index: int, options: Options) -> LayerProfile:
        """The profile of a layer.

        Args:
            weight: the projection weight that names the layer; None if the graph shows none.
            owner: who asks; layers without a weight are known to it alone, by ``index``.
            index: number of the layer in the owner's graph.
            options: codes differ by them.
        """
        with self._lock:
            if weight is None:
                known = self._by_owner.setdefault(owner, {})
                key: Any = (index, options.key)
            else:
                known = self._by_weight.setdefault(weight, {})
                key = (_version(weight), options.key)
            return known.setdefault(key, LayerProfile())  # type: ignore[no-any-return]

    def clear(self) -> None:
        """Forget everything that was fitted; packed caches keep their codes."""
        with self._lock:
            self._by_weight = WeakIdKeyDictionary()
            self._by_owner = WeakKeyDictionary()


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


PROFILES = Profiles()


def learn_all(
    profiles: Sequence[LayerProfile], sums: Sequence[Sequence[Tensor]],
    dims: Sequence[tuple[int, int]], options: Options,
) -> None:  # fmt: skip
    """Learn from one prefill, layer by layer."""
    with torch.no_grad():
        for profile, tensors, dim in zip(profiles, sums, dims, strict=True):
            if profile.codes is None:
                profile.learn(Moments(*tensors), dim, options)
