"""Fitted codes by layer: learned from the first real prefill, kept for the process.

A layer is named by the projection weight that its new keys are made with, so that every graph
that Dynamo traces of a model (other lengths, other batches) finds the same codes. A weight that
has changed since (an optimiser step) is another layer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .cache.store import exact_ref
from .codec import CodeRef
from .codec.fit import fit_transform
from .codec.moments import Moments
from .options import Options

log = logging.getLogger(__name__)


@dataclass
class LayerProfile:
    """What is known of one layer under one set of options.

    Attributes:
        moments: sums over the prefills seen so far; None once fitted.
        codes: refs for keys and values once there is a fit.
        reason: why there is no fit, for the report.
    """

    moments: Moments | None = None
    codes: tuple[CodeRef, CodeRef] | None = None
    reason: str = "no prefill seen yet"

    def add(self, moments: Moments) -> None:
        """Add a prefill's moments."""
        self.moments = moments if self.moments is None else self.moments + moments

    def is_ready(self, options: Options) -> bool:
        """Whether enough tokens have been seen for a fit."""
        assert self.moments is not None
        count = int(self.moments.count)
        wanted = options.fit_tokens or min(4 * self.moments.k_sum.numel(), 1024)
        self.reason = f"{count} of {wanted} tokens seen that a fit wants: packed exactly"
        return count >= wanted


class Profiles:
    """All layer profiles of the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_weight: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._by_owner: WeakKeyDictionary[Any, dict[Any, LayerProfile]] = WeakKeyDictionary()

    def layer(
        self, weight: Tensor | None, owner: Any, index: int, options: Options
    ) -> LayerProfile:
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
            return known.setdefault(key, LayerProfile())

    def clear(self) -> None:
        """Forget everything that was fitted; packed caches keep their codes."""
        with self._lock:
            self._by_weight = WeakIdKeyDictionary()
            self._by_owner = WeakKeyDictionary()


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


PROFILES = Profiles()


def learn(
    profiles: Sequence[LayerProfile], sums: Sequence[Sequence[Tensor]],
    dims: Sequence[tuple[int, int]], options: Options,
) -> None:  # fmt: skip
    """Learn from one prefill; layers of one shape that are ready are fitted together.

    Args:
        profiles: of the layers of a graph.
        sums: the moments of this prefill, a layer each.
        dims: head dimensions of keys and values.
        options: the ratio and how many tokens a fit wants.
    """
    ready: dict[Any, list[LayerProfile]] = {}
    for profile, tensors, dim in zip(profiles, sums, dims, strict=True):
        if profile.codes is not None:
            continue
        profile.add(Moments(*tensors))
        assert profile.moments is not None
        if profile.is_ready(options):
            channels = profile.moments.k_sum.numel(), profile.moments.v_sum.numel()
            group = ready.setdefault((dim, channels), [])
            if all(profile is not other for other in group):
                group.append(profile)
    for (dim, _), group in ready.items():
        _fit(group, dim, options)


def _fit(group: Sequence[LayerProfile], dims: tuple[int, int], options: Options) -> None:
    moments = [p.moments for p in group if p.moments is not None]
    started = time.monotonic()
    try:
        codes = fit_transform(moments, *dims, options.ratio)
    except ValueError as error:
        heads = moments[0].k_sum.numel() // dims[0]
        exact = exact_ref(heads, dims[0]), exact_ref(heads, dims[1])
        log.warning("attentionpack: %s; these layers are packed exactly", error)
        for profile in group:
            profile.codes, profile.moments = exact, None
            profile.reason = f"{error}: packed exactly"
        return
    log.info("fitted %d layers in %.1f s", len(group), time.monotonic() - started)
    for profile, (k, v) in zip(group, codes, strict=True):
        profile.codes, profile.moments, profile.reason = (CodeRef(k), CodeRef(v)), None, ""
