"""What is known of each layer: moments of what was seen, or codes; kept for the process.

A layer is named by the projection weight that its new keys are made with, so that every graph
that Dynamo traces of a model (other lengths, other batches) finds the same codes. A weight that
has changed since (an optimiser step) is another layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..codec import CodeRef
from ..codec.kinds import least_tokens
from ..codec.moments import Moments
from ..codec.rotation import Rotation, Turn
from ..locks import lock, reentrant_lock
from ..options import Options
from .file import SavedProfile

FEWEST_VISUAL = 32
"""Visual tokens that a code for visual tokens wants to have seen."""

FEWEST = 64
"""Codes of fewer tokens than this are worse than none, whatever ``fit_tokens`` says."""

ANY_LENGTH = -1
"""The reach of codes that do not depend on positions, or lose nothing."""

LEARNING = reentrant_lock()
"""Held by whoever learns, loads or replaces codes: two threads do not fit the same layers."""


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the codes of a graph's layers come from.

    Attributes:
        text: for the report.
        saved: what is, or could be, kept on disk; None if the weights have no fingerprint.
    """

    text: str
    saved: SavedProfile | None


@dataclass(frozen=True, eq=False)
class Fit:
    """Codes of one layer.

    Attributes:
        codes: refs for keys and values.
        rotation: of the keys by their position, if known.
        reach: tokens of context that the codes serve.
        reason: what is not as it should be, for the report.
        tokens: that the codes were fitted on.
        visual: how many of them are visual; None: not known.
        settled: no prompt is a try to fit them anew for its visual tokens.
    """

    codes: tuple[CodeRef, CodeRef]
    rotation: Rotation | None
    reach: int
    reason: str
    tokens: int
    visual: int | None = None
    settled: bool = False

    def serves(self, length: int, visual: bool = False) -> bool:
        """Whether the codes are good for a prompt of ``length`` tokens, visual ones or not."""
        reaches = self.reach == ANY_LENGTH or length <= self.reach
        return reaches and not (visual and self.is_blind)

    @property
    def is_blind(self) -> bool:
        """Whether the codes were fitted on text alone; of a kind's own code, without its kind.

        Bug: codes by kind of a prompt whose kinds were not known, or with a handful of visual
        tokens, were kept for good.
        """
        if self.settled:
            return False
        if self.codes[0].layout.plane_kinds:
            return (self.visual or 0) < FEWEST_VISUAL
        return self.visual == 0


@dataclass(frozen=True)
class Lesson:
    """What one prefill tells of one layer.

    Attributes:
        sums: the tensors of its :class:`Moments`.
        turn: the rotation of its tokens, if the graph shows it; the moments are then without it.
        visible: ``[B, S]`` bool, False for padding, or None.
        dims: head dimensions of keys and values.
        length: tokens of the prompt.
        visual: the tensors of the :class:`Moments` of visual tokens; empty: there are none; None:
            it is not known which are.
        importance: ``[B, S]``: attention that the tokens received; None: it was not asked for.
        mask: ``[B, S]`` bool: which tokens are visual; None: none are, or it is not known.
    """

    sums: Sequence[Tensor]
    turn: Turn | None
    visible: Tensor | None
    dims: tuple[int, int]
    length: int
    visual: Sequence[Tensor] | None = None
    importance: Tensor | None = None
    mask: Tensor | None = None


@dataclass
class LayerProfile:
    """What is known of one layer under one set of options.

    Attributes:
        fit: its codes, once there are any. Replaced as a whole.
        origin: of the codes.
        sought: looked for on disk.
        moments: sums over the prefills seen since the last fit.
        visual: sums over the visual tokens in them, if there were any.
        knows_kinds: whether it was known of all of them which tokens are visual.
        rotation: of the keys seen by their position, where the graph shows it.
        dims: head dimensions of keys and values.
        longest: tokens of the longest prompt seen.
    """

    fit: Fit | None = None
    origin: Origin | None = None
    sought: bool = False
    moments: Moments | None = None
    visual: Moments | None = None
    knows_kinds: bool = True
    rotation: Rotation | None = None
    dims: tuple[int, int] = (0, 0)
    longest: int = 0
    _waiting: str = "no prefill seen yet"

    def serves(self, length: int, visual: bool = False) -> bool:
        """Whether there are codes for a prompt of ``length`` tokens, visual ones or not."""
        return self.fit is not None and self.fit.serves(length, visual)

    @property
    def codes(self) -> tuple[CodeRef, CodeRef] | None:
        """Refs for keys and values, if there are any."""
        return None if self.fit is None else self.fit.codes

    @property
    def reason(self) -> str:
        """What is not as it should be, for the report."""
        if self.fit is None:
            return f"{self._waiting}: packed exactly" if self.moments else self._waiting
        if self.moments is None:
            return self.fit.reason
        if self.fit.is_blind and self.visual is not None:
            return f"the codes have not seen visual tokens; {self._waiting}"
        return f"the codes are for contexts of up to {self.fit.reach} tokens; {self._waiting}"

    def take(self, lesson: Lesson) -> None:
        """Add what a prefill tells."""
        rotation = None
        if lesson.turn is not None:
            rotation = lesson.turn.rotation(lesson.dims[0], lesson.visible)
        new = Moments(*lesson.sums)
        images = Moments(*lesson.visual) if lesson.visual else None
        if self.moments is None or (self.rotation is None) != (rotation is None):
            self.moments, self.visual = new, images  # with and without rotation do not add up
            self.knows_kinds = lesson.visual is not None
        else:
            self.moments = self.moments + new
            self.visual = self.visual + images if self.visual and images else self.visual or images
            self.knows_kinds = self.knows_kinds and lesson.visual is not None
        self.rotation, self.dims = rotation, lesson.dims
        self.longest = max(self.longest, lesson.length)

    @property
    def count(self) -> int:
        """Tokens seen since the last fit."""
        return 0 if self.moments is None else int(self.moments.count)

    def is_ready(self, options: Options) -> bool:
        """Whether enough tokens have been seen for a fit."""
        assert self.moments is not None
        count = self.count
        wanted = options.fit_tokens or least_tokens(self.moments.k_sum.numel())
        wanted = max(wanted, FEWEST)
        self._waiting = f"{count} of {wanted} tokens seen that a fit wants"
        if options.visual_ratio and self.fit is not None and self.fit.is_blind:
            images = self.visual_count or 0
            if images < FEWEST_VISUAL and self.longest <= self.fit.reach:
                self._waiting = f"{images} of {FEWEST_VISUAL} visual tokens seen that a fit wants"
                return False
        return count >= wanted

    @property
    def visual_count(self) -> int | None:
        """Visual tokens among those seen since the last fit; None: not known."""
        if not self.knows_kinds:
            return None
        return 0 if self.visual is None else int(self.visual.count)

    def use(self, fit: Fit, origin: Origin | None = None) -> None:
        """Have these codes from now on."""
        self.fit, self.origin = fit, origin
        self.moments, self.visual = None, None

    @property
    def shape(self) -> tuple[int, ...]:
        """Layers that agree in these are fitted together."""
        assert self.moments is not None
        return (*self.dims, self.moments.k_sum.numel(), self.moments.v_sum.numel())


class Profiles:
    """All layer profiles of the process."""

    def __init__(self) -> None:
        self._lock = lock()
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
                key: Any = (index, repr(options.key))
            else:
                known = self._by_weight.setdefault(weight, {})
                key = (_version(weight), repr(options.key))
            return known.setdefault(key, LayerProfile())

    def put(self, weight: Tensor, options: str, profile: LayerProfile) -> None:
        """Replace what is known of the layer that ``weight`` names.

        Args:
            weight: of the projection of its keys.
            options: text of what codes depend on.
            profile: what is known now.
        """
        with self._lock:
            self._by_weight.setdefault(weight, {})[_version(weight), options] = profile

    def of_weight(self, weight: Tensor) -> dict[str, LayerProfile]:
        """What is known of the layer that ``weight`` names as it is now, by options."""
        with self._lock:
            known = self._by_weight.get(weight, {})
            return {key[1]: p for key, p in known.items() if key[0] == _version(weight)}

    def clear(self) -> None:
        """Forget everything that was fitted; packed caches keep their codes."""
        with self._lock:
            self._by_weight = WeakIdKeyDictionary()
            self._by_owner = WeakKeyDictionary()


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


PROFILES = Profiles()
