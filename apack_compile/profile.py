"""Fitted codes by layer: learned from the first real prefill, kept for the process.

A layer is named by the projection weight that its new keys are made with, so that every graph
that Dynamo traces of a model (other lengths, other batches) finds the same codes. A weight that
has changed since (an optimiser step) is another layer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .cache.store import exact_ref
from .codec import CodeRef, TransformLayout
from .codec.fit import Evidence, fit_transform
from .codec.moments import Moments
from .codec.rotation import Rotation, Turn
from .codec.sensitivity import Sensitivity
from .options import Options

log = logging.getLogger(__name__)

LEAST_REACH = 4096
"""Codes of rotated keys are fitted for contexts of at least so many tokens, and twice those seen;
where the rotation is not known, for a quarter more than those seen."""

ANY_LENGTH = -1
"""The reach of codes that do not depend on positions, or lose nothing."""

MOST_STRAYS = 0.05
"""Keys are coded before their rotation if at most this share of the tokens has other positions
than a count gives (images in models with positions by row and column have)."""

Sense = Callable[[], "list[Sensitivity] | str"]
"""Measures the sensitivity of all layers; a text says why it cannot."""


@dataclass
class LayerProfile:
    """What is known of one layer under one set of options.

    Attributes:
        moments: sums over the prefills seen so far; None once fitted.
        rotation: of the keys by their position, where the graphs show it.
        codes: refs for keys and values once there is a fit.
        reach: tokens of context that the codes were fitted for.
        reason: what is not as it should be, for the report.
    """

    moments: Moments | None = None
    rotation: Rotation | None = None
    codes: tuple[CodeRef, CodeRef] | None = None
    reach: int = 0
    reason: str = "no prefill seen yet"

    def serves(self, length: int) -> bool:
        """Whether there are codes for a prompt of ``length`` tokens."""
        return self.codes is not None and (self.reach == ANY_LENGTH or length <= self.reach)

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


@dataclass(frozen=True)
class Lesson:
    """What one prefill tells of one layer.

    Attributes:
        sums: the tensors of its :class:`Moments`.
        turn: the rotation of its tokens, if the graph shows it; the moments are then without it.
        visible: ``[B, S]`` bool, False for padding, or None.
        dims: head dimensions of keys and values.
        length: tokens of the prompt.
    """

    sums: Sequence[Tensor]
    turn: Turn | None
    visible: Tensor | None
    dims: tuple[int, int]
    length: int


def learn(
    profiles: Sequence[LayerProfile], lessons: Sequence[Lesson], options: Options, sense: Sense
) -> None:
    """Learn from one prefill; layers of one shape that are ready are fitted together.

    Args:
        profiles: of the layers of a graph.
        lessons: one for each.
        options: the ratio and how many tokens a fit wants.
        sense: measures the sensitivity of all layers, or says why it cannot.
    """
    ready: dict[Any, list[int]] = {}
    seen: list[LayerProfile] = []
    for index, (profile, lesson) in enumerate(zip(profiles, lessons, strict=True)):
        if profile.serves(lesson.length) or any(profile is other for other in seen):
            continue
        seen.append(profile)
        rotation = lesson.turn and lesson.turn.rotation(lesson.dims[0], lesson.visible)
        if profile.moments is not None and (profile.rotation is None) != (rotation is None):
            profile.moments = None  # sums with and without rotation do not add up
        profile.rotation = rotation
        profile.add(Moments(*lesson.sums))
        assert profile.moments is not None
        if profile.codes is not None or profile.is_ready(options):
            channels = profile.moments.k_sum.numel(), profile.moments.v_sum.numel()
            ready.setdefault((lesson.dims, channels), []).append(index)
    if not ready:
        return
    measured = sense()
    for indices in ready.values():
        group = [profiles[i] for i in indices]
        found = measured if isinstance(measured, str) else [measured[i] for i in indices]
        _fit(group, [lessons[i] for i in indices], found, options)


def _fit(
    group: Sequence[LayerProfile], lessons: Sequence[Lesson],
    sensitivities: list[Sensitivity] | str, options: Options,
) -> None:  # fmt: skip
    """Fit layers of one shape, for contexts up to the reach."""
    dims, length = lessons[0].dims, lessons[0].length
    turned = all(p.rotation is not None for p in group)
    reach = max(LEAST_REACH, 2 * length) if turned else -(-5 * length // 1024) * 256
    reasons = []
    if isinstance(sensitivities, str):
        reasons.append(f"sensitivity not measured ({sensitivities}): the same bits in every layer")
    recipe = options.recipe
    if recipe.k_code == "pre-rope":
        obstacle = _bars_pre_rope([p.rotation for p in group])
        if obstacle:
            recipe = replace(recipe, k_code="post-rope")
            reasons.append(f"keys are coded as attention sees them: {obstacle}")
    layers = [
        Evidence(p.moments, p.rotation, None if isinstance(sensitivities, str) else s)
        for p, s in zip(group, sensitivities, strict=False)
        if p.moments is not None
    ]
    layouts = _layouts_of(group)  # kept: graphs are compiled for them
    started = time.monotonic()
    try:
        codes = fit_transform(layers, dims, recipe, reach, layouts)
    except ValueError as error:
        heads = layers[0].moments.k_sum.numel() // dims[0]
        exact = exact_ref(heads, dims[0]), exact_ref(heads, dims[1])
        log.warning("attentionpack: %s; these layers are packed exactly", error)
        for profile in group:
            profile.codes, profile.moments, profile.reach = exact, None, ANY_LENGTH
            profile.reason = f"{error}: packed exactly"
        return
    log.info("fitted %d layers in %.1f s", len(group), time.monotonic() - started)
    if codes[0][0].layout.positional:
        reach = ANY_LENGTH
    for profile, (k, v) in zip(group, codes, strict=True):
        profile.codes, profile.moments = (CodeRef(k), CodeRef(v)), None
        profile.reach, profile.reason = reach, "; ".join(reasons)


def _bars_pre_rope(rotations: Sequence[Rotation | None]) -> str:
    """Why keys cannot be coded before their rotation; empty if they can."""
    known = [r for r in rotations if r is not None]
    if len(known) < len(rotations):
        return "the graph does not show their rotation"
    strays = max(r.strays for r in known)
    if strays > MOST_STRAYS:
        return f"{strays:.0%} of the prompt's tokens have other positions than a count gives"
    return ""


def _layouts_of(
    group: Sequence[LayerProfile],
) -> list[tuple[TransformLayout, TransformLayout]] | None:
    """The layouts that the layers have from an earlier fit, if all have."""
    layouts = [tuple(ref.layout for ref in p.codes) for p in group if p.codes is not None]
    if len(layouts) < len(group):
        return None
    return layouts  # type: ignore[return-value]
