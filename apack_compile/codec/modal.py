r"""Two transform codes side by side: one for visual tokens, one for text.

An image brings hundreds of tokens that resemble each other; instructions are few, and every word of
them counts. So each kind of token has a code of its own, with its own bytes (``visual_ratio``,
``text_ratio``) and its own basis. Every payload tensor of both codes is a plane with rows for the
tokens of its kind alone (``kernels/planes.py``), and one byte a token says which kind that is:

    0   text: in the planes of the code of text
    1   visual: in those of the code of visual tokens

Which tokens are visual is known of a prompt; those that come later are text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from .code import Code
from .kinds import TEXT, VISUAL
from .layout import PARTS, Judged, Layout
from .transform import TransformLayout

SIZES = ("groups", "r8", "r4", "r2", "gain")
"""In what the two codes may differ."""


_Both = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Tensors of the code of visual tokens, and of that of text."""


@dataclass(frozen=True)
class ModalLayout(Layout):
    """A transform code for visual tokens and one for text.

    Attributes:
        visual_groups .. visual_gain: of the code of visual tokens, see :class:`TransformLayout`.
        text_groups .. text_gain: of the code of text.
        rotary, interleaved: of both.

    Payload: kinds; then that of the code of visual tokens, then that of text. Params: those of the
    code of visual tokens, then those of text.
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

    kind: ClassVar[str] = "modal"

    @property
    def visual(self) -> TransformLayout:
        """The code of visual tokens."""
        return _inner(self, "visual")

    @property
    def text(self) -> TransformLayout:
        """The code of text."""
        return _inner(self, "text")

    @property
    def positional(self) -> bool:
        """Whether keys are coded before their rotation."""
        return self.rotary > 0

    @property
    def param_count(self) -> int:
        """Of both codes."""
        return self.visual.param_count + self.text.param_count

    @property
    def plane_kinds(self) -> tuple[int, ...]:
        """Of each plane, the kind of the tokens that have a row in it."""
        counts = (len(code.payload_fields(torch.float32)) for code in (self.visual, self.text))
        each = zip((VISUAL, TEXT), counts, strict=True)
        return tuple(kind for kind, count in each for _ in range(count))

    @property
    def shares(self) -> tuple[int, ...]:
        """Of ``PARTS`` tokens, how many have a row in each plane at most: a prompt decides."""
        return (PARTS,) * len(self.plane_kinds)

    @property
    def later_shares(self) -> tuple[int, ...]:
        """The same of tokens that come later: all are text."""
        return tuple(PARTS if kind == TEXT else 0 for kind in self.plane_kinds)

    def payload_fields(self, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], ...]:
        """Kinds, and what the two codes have."""
        inside = (code.payload_fields(dtype) for code in (self.visual, self.text))
        return ((1, torch.uint8), *(field for code in inside for field in code))

    def token_bytes(self, dtype: torch.dtype, kind: int = TEXT) -> float:
        """Bytes that one coded token of a kind takes."""
        code = self.visual if kind == VISUAL else self.text
        return 1 + code.token_bytes(dtype)

    def encode(
        self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Every token in both codes, and its kind (None: all are text)."""
        visual, text = self._params(params)
        return [
            _kinds(x, levels)[..., None],
            *self.visual.encode(x, visual, positions),
            *self.text.encode(x, text, positions),
        ]

    def encode_and_judge(
        self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> tuple[list[Tensor], Judged | None]:  # fmt: skip
        """Each token judged by its own code: errors are over what that expects."""
        visual, text = self._params(params)
        kinds = _kinds(x, levels)
        images, of_images = self.visual.encode_and_judge(x, visual, positions)
        words, of_words = self.text.encode_and_judge(x, text, positions)
        assert of_images is not None and of_words is not None
        pairs = zip(of_images, of_words, strict=True)
        judged = Judged(*(torch.where(kinds == VISUAL, image, word) for image, word in pairs))
        return [kinds[..., None], *images, *words], judged

    def decode(
        self, payload: Sequence[Tensor], params: Sequence[Tensor], dtype: torch.dtype,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Each token by the code of its kind."""
        seen, (images, words), (visual, text) = self._split(payload, params)
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
        seen, (images, words), (visual, text) = self._split(payload, params)
        return torch.where(
            seen[:, None, None],
            self.visual.scores(q, images, visual, positions),
            self.text.scores(q, words, text, positions),
        )

    def mix(self, p: Tensor, payload: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """Each code mixes the tokens of its kind, without those of the other."""
        seen, (images, words), (visual, text) = self._split(payload, params)
        here = seen[:, None, None]
        return self.visual.mix(torch.where(here, p, 0.0), images, visual) + self.text.mix(
            torch.where(here, 0.0, p), words, text
        )

    def _params(self, params: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        count = self.visual.param_count
        return params[:count], params[count:]

    def _split(
        self, payload: Sequence[Tensor], params: Sequence[Tensor]
    ) -> tuple[Tensor, _Both, _Both]:
        """Which tokens are visual ``[B, T]``; payloads and parameters of both codes."""
        count = self.plane_kinds.count(VISUAL)
        kinds, *planes = payload
        return kinds[..., 0] == VISUAL, (planes[:count], planes[count:]), self._params(params)


def _kinds(x: Tensor, levels: Tensor | None) -> Tensor:
    """Kinds ``[B, T]`` uint8 of tokens ``x [B, H, T, D]``; all text if nothing is known."""
    if levels is None:
        return torch.full((x.shape[0], x.shape[2]), TEXT, dtype=torch.uint8, device=x.device)
    return levels


@cache
def _inner(layout: ModalLayout, name: str) -> TransformLayout:
    sizes = {size: getattr(layout, f"{name}_{size}") for size in SIZES}
    turned = {"rotary": layout.rotary, "interleaved": layout.interleaved}
    return TransformLayout(layout.heads, layout.dim, **sizes, **turned)


def modal(visual: TransformLayout, text: TransformLayout) -> ModalLayout:
    """The layout of both.

    Raises:
        ValueError: they differ in more than :data:`SIZES`.
    """
    sizes = {
        f"{name}_{size}": getattr(code, size)
        for name, code in (("visual", visual), ("text", text)) for size in SIZES
    }  # fmt: skip
    layout = ModalLayout(
        text.heads, text.dim, **sizes, rotary=text.rotary, interleaved=text.interleaved
    )
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
