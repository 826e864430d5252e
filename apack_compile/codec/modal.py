r"""Two transform codes side by side: one for visual tokens, one for text.

An image brings hundreds of tokens that resemble each other; instructions are few, and every word of
them counts. So each kind of token has a code of its own, with its own bytes (``visual_ratio``,
``text_ratio``) and its own basis, with or without tiers (``tiered.py``); visual tokens of a prompt
may be dropped (``evicting.py``). Every payload tensor of both codes is a plane with rows for tokens
of its kind alone (``kernels/planes.py``), and one byte a token says which planes it is in, T being
the tiers of text:

    0 .. T          text, of this level of its code
    T + 1 + l       visual, of level l of its code

Which tokens are visual is known of a prompt; those that come later are text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from .code import Code
from .evicting import evicting
from .kinds import TEXT, VISUAL
from .layout import PARTS, Judged, Layout
from .levels import stored_tensors, with_levels, without_levels
from .tiered import layout_of
from .transform import TransformLayout

SIZES = ("groups", "r8", "r4", "r2", "gain", "plane1", "plane2", "plane3", "plane4")
"""In what the two codes may differ, besides that text is never dropped."""


@dataclass(frozen=True)
class ModalLayout(Layout):
    """A transform code for visual tokens and one for text.

    Attributes:
        visual_groups .. visual_gain, visual_plane1 .. visual_plane4: of the code of visual tokens,
            see :class:`TransformLayout` and :class:`.tiered.TieredLayout`.
        text_groups .. text_gain, text_plane1 .. text_plane4: of the code of text.
        rotary, interleaved, exact: of both.
        visual_evicted: of ``PARTS`` visual tokens of a prompt, how many are dropped.

    Payload: levels; then that of the code of visual tokens, then that of text, without levels of
    their own. Params: those of the code of visual tokens, then those of text.
    """

    visual_groups: int
    visual_r8: int
    visual_r4: int
    visual_r2: int
    visual_gain: int
    text_groups: int
    text_r8: int
    text_r4: int
    text_r2: int
    text_gain: int
    rotary: int = 0
    interleaved: int = 0
    exact: int = 0
    visual_plane1: int = 0
    visual_plane2: int = 0
    visual_plane3: int = 0
    visual_plane4: int = 0
    visual_evicted: int = 0
    text_plane1: int = 0
    text_plane2: int = 0
    text_plane3: int = 0
    text_plane4: int = 0

    kind: ClassVar[str] = "modal"

    @property
    def visual(self) -> TransformLayout:
        """The code of visual tokens."""
        return _inner(self, "visual", self.visual_evicted)

    @property
    def text(self) -> TransformLayout:
        """The code of text."""
        return _inner(self, "text")

    @property
    def by_kind(self) -> tuple[TransformLayout, ...]:
        """The codes of text and of visual tokens: of kinds in their order."""
        return self.text, self.visual

    @property
    def kept(self) -> int:
        """Of ``KEPT_OF`` tokens, how many stay exact."""
        return self.exact

    @property
    def positional(self) -> bool:
        """Whether keys are coded before their rotation."""
        return self.rotary > 0

    @property
    def param_count(self) -> int:
        """Of both codes."""
        return self.visual.param_count + self.text.param_count

    @property
    def first_levels(self) -> tuple[int, ...]:
        """The lowest level of each kind."""
        return 0, 1 + len(self.text.shares)

    @property
    def plane_kinds(self) -> tuple[int, ...]:
        """Of each plane, the kind of the tokens that have a row in it."""
        return tuple(
            kind for kind in (VISUAL, TEXT) for _ in range(stored_tensors(self.by_kind[kind]))
        )

    @property
    def plane_levels(self) -> tuple[tuple[int, int], ...]:
        """Of each plane, the lowest and the highest level of the tokens that have a row in it."""
        levels: list[tuple[int, int]] = []
        for kind in (VISUAL, TEXT):
            code, first = self.by_kind[kind], self.first_levels[kind]
            last = first + len(code.shares)
            whole = stored_tensors(code) - len(code.shares)
            levels += [(first, last)] * whole
            levels += [(first + plane, last) for plane in range(1, len(code.shares) + 1)]
        return tuple(levels)

    @property
    def shares(self) -> tuple[int, ...]:
        """Of ``PARTS`` tokens of its kind, how many have a row in each plane."""
        return self._shares(self.visual.shares, self.text.shares)

    @property
    def later_shares(self) -> tuple[int, ...]:
        """The same of tokens that come later: all are text."""
        every = self._shares(self.visual.shares, self.text.later_shares)
        kinds = zip(every, self.plane_kinds, strict=True)
        return tuple(share if kind == TEXT else 0 for share, kind in kinds)

    @property
    def later_steps(self) -> tuple[int, ...]:
        """Of ``PARTS`` tokens that come later, how many are above level 0, 1, ..."""
        return self.text.later_shares

    @property
    def tier_shares(self) -> tuple[int, ...]:
        """Of ``PARTS`` tokens, how many have one bit more, two, ..., of text or else of others."""
        return self.text.tier_shares or self.visual.tier_shares

    @property
    def tracks_importance(self) -> bool:
        """Whether bits of later tokens, which are text, go by the attention they receive."""
        return self.text.tracks_importance

    @property
    def weighs(self) -> bool:
        """Whether one of the codes has levels."""
        return any(code.shares for code in self.by_kind)

    @property
    def evicts(self) -> int:
        """Of ``PARTS`` visual tokens of a prompt, how many are dropped."""
        return self.visual_evicted

    @property
    def dropped_level(self) -> int | None:
        """The level of visual tokens that were dropped."""
        return self.first_levels[VISUAL] if self.evicts else None

    def kinds_of(self, levels: Tensor | None) -> Tensor | None:
        """The kinds of tokens of ``levels``."""
        return None if levels is None else (levels >= self.first_levels[VISUAL]).to(torch.uint8)

    def lacks(self, levels: Tensor) -> Tensor:
        """Bits that tokens lack, by the codes of their kinds."""
        text, visual = self._levels(levels)
        is_visual = levels >= self.first_levels[VISUAL]
        return torch.where(is_visual, self.visual.lacks(visual), self.text.lacks(text))

    def payload_fields(self, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], ...]:
        """Levels, and what the two codes have besides theirs."""
        inside: list[tuple[int, torch.dtype]] = []
        for code in (self.visual, self.text):
            inside += without_levels(code, code.payload_fields(dtype))
        return ((1, torch.uint8), *inside)

    def token_bytes(self, dtype: torch.dtype, kind: int = TEXT) -> float:
        """Bytes that one coded token of a kind takes, in the mean over those of a prompt."""
        code = self.by_kind[kind]
        return 1 + code.token_bytes(dtype) - bool(code.shares)

    def encode(
        self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Every token in both codes, and its level (None: all are text, of the highest)."""
        return self.encode_and_judge(x, params, positions, levels)[0]

    def encode_and_judge(
        self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> tuple[list[Tensor], Judged | None]:  # fmt: skip
        """Each token judged by its own code: errors are over what that expects."""
        if levels is None:
            shape = x.shape[0], x.shape[2]
            levels = torch.full(shape, len(self.text.shares), dtype=torch.uint8, device=x.device)
        of_text, of_visual = self._levels(levels)
        text, visual = self.parts(params)
        words, of_words = self.text.encode_and_judge(x, text, positions, of_text)
        images, of_images = self.visual.encode_and_judge(x, visual, positions, of_visual)
        assert of_images is not None and of_words is not None
        seen = levels >= self.first_levels[VISUAL]
        pairs = zip(of_images, of_words, strict=True)
        judged = Judged(*(torch.where(seen, image, word) for image, word in pairs))
        inside = (
            *without_levels(self.visual, images), *without_levels(self.text, words)
        )  # fmt: skip
        return [levels[..., None], *inside], judged

    def decode(
        self, payload: Sequence[Tensor], params: Sequence[Tensor], dtype: torch.dtype,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Each token by the code of its kind."""
        seen, (words, images), (text, visual) = self._split(payload, params)
        return torch.where(
            seen[:, None, :, None],
            self.visual.decode(images, visual, dtype, positions),
            self.text.decode(words, text, dtype, positions),
        )

    def scores(
        self, q: Tensor, payload: Sequence[Tensor], params: Sequence[Tensor],
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Each token by the code of its kind."""
        seen, (words, images), (text, visual) = self._split(payload, params)
        return torch.where(
            seen[:, None, None],
            self.visual.scores(q, images, visual, positions),
            self.text.scores(q, words, text, positions),
        )

    def mix(self, p: Tensor, payload: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """Each code mixes the tokens of its kind, without those of the other."""
        seen, (words, images), (text, visual) = self._split(payload, params)
        here = seen[:, None, None]
        return self.visual.mix(torch.where(here, p, 0.0), images, visual) + self.text.mix(
            torch.where(here, 0.0, p), words, text
        )

    def parts(self, params: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The parameters of the codes of text and of visual tokens."""
        count = self.visual.param_count
        return params[count:], params[:count]

    def planes(self, payload: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """What of the payload is of text and of visual tokens."""
        count = 1 + stored_tensors(self.visual)
        return payload[count:], payload[1:count]

    def _levels(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Levels of the codes of text and of visual tokens, any for tokens of the other kind."""
        inside = []
        for code, first in zip(self.by_kind, self.first_levels, strict=True):
            level = (levels.to(torch.int16) - first).clamp(0, len(code.shares))
            inside.append(level.to(torch.uint8))
        return inside[TEXT], inside[VISUAL]

    def _split(
        self, payload: Sequence[Tensor], params: Sequence[Tensor]
    ) -> tuple[Tensor, list[list[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]]:
        """Which tokens are visual ``[B, T]``; payloads and parameters of both codes."""
        levels = payload[0][..., 0]
        inside = [
            with_levels(code, tensors, own)
            for code, tensors, own in zip(
                self.by_kind, self.planes(payload), self._levels(levels), strict=True
            )
        ]
        return levels >= self.first_levels[VISUAL], inside, self.parts(params)

    def _shares(self, visual: Sequence[int], text: Sequence[int]) -> tuple[int, ...]:
        """Shares of planes, those in which all tokens of a kind have a row among them."""
        every: list[int] = []
        for code, own in ((self.visual, visual), (self.text, text)):
            every += [PARTS] * (stored_tensors(code) - len(own)) + list(own)
        return tuple(every)


@cache
def _inner(layout: ModalLayout, name: str, evicted: int = 0) -> TransformLayout:
    groups, r8, r4, r2, gain, *planes = (getattr(layout, f"{name}_{size}") for size in SIZES)
    shares = [plane for plane in planes if plane]
    code = layout_of((layout.heads, layout.dim, groups), (r8, r4, r2), gain, shares)
    turned = {"rotary": layout.rotary, "interleaved": layout.interleaved}
    return evicting(replace(code, gain=gain, exact=layout.exact, **turned), evicted)


def modal(visual: TransformLayout, text: TransformLayout) -> ModalLayout:
    """The layout of both.

    Raises:
        ValueError: they differ in more than :data:`SIZES`, or text is dropped.
    """
    sizes = {
        f"{name}_{size}": getattr(code, size, 0)
        for name, code in (("visual", visual), ("text", text)) for size in SIZES
    }  # fmt: skip
    layout = ModalLayout(
        text.heads, text.dim, **sizes, rotary=text.rotary, interleaved=text.interleaved,
        exact=text.exact, visual_evicted=visual.evicts,
    )  # fmt: skip
    if (layout.visual, layout.text) != (visual, text):
        names = ", ".join(f.name for f in fields(ModalLayout))
        raise ValueError(f"{visual.spec} and {text.spec} differ in more than {names}")
    return layout


def joined(visual: Code, text: Code, counts: tuple[float, float]) -> Code:
    """The code of both; its error is the mean over ``counts`` text and visual tokens."""
    assert isinstance(visual.layout, TransformLayout) and isinstance(text.layout, TransformLayout)
    kinds = None
    if visual.kinds is not None and text.kinds is not None:
        kinds = text.kinds[TEXT], visual.kinds[VISUAL]
    errors = kinds or (text.error, visual.error)
    found = [(n, error) for n, error in zip(counts, errors, strict=True) if n]
    error = sum(n * e for n, e in found) / sum(n for n, _ in found)
    return Code(modal(visual.layout, text.layout), (*visual.params, *text.params), error, kinds)
