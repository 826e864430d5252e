r"""A transform code of which some tokens of a prompt are dropped for good.

Attention leaves most tokens of a long prompt nearly unread (AttentionPack, arXiv 2603.23914, 3.3;
SnapKV, arXiv 2404.14469). Of the tokens of a prompt that are coded together, those that received
least of it have no row in any payload tensor: every tensor of the code that is inside is a plane
(``kernels/planes.py``), and one byte a token says which of them it is in:

    level 0          dropped: attention does not see it
    level N          has rows in the N tensors of the code inside; of one in tiers, no planes
    level N + l      of a code in tiers: in planes 1 to l

Tokens that come later, in decoding or in a next turn, are never dropped. Dropped tokens keep their
positions: lengths, masks and rotations are what they were. Read densely, they are the mean of the
code; whoever attends to that has to hide them (``absent``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from .layout import PARTS, Judged, working_dtype
from .levels import stored_tensors, with_levels, without_levels
from .tiered import TieredLayout
from .transform import TransformLayout


@dataclass(frozen=True)
class EvictingLayout(TieredLayout):
    """A code, in tiers or not (no planes), for the tokens that stay: shares of planes are of those.

    Attributes:
        evicted: of ``PARTS`` tokens of a prompt, how many are dropped.

    Payload: levels; then that of the code inside, its own levels left out. Params: those of the
    code inside.
    """

    evicted: int = 0

    kind: ClassVar[str] = "evicting"

    @property
    def inner(self) -> TransformLayout:
        """The code of the tokens that stay."""
        return _inner(self)

    @property
    def evicts(self) -> int:
        """Of ``PARTS`` tokens of a prompt, how many are dropped."""
        return self.evicted

    @property
    def param_count(self) -> int:
        """Of the code inside."""
        return self.inner.param_count

    @property
    def _whole(self) -> int:
        """Tensors in which every token that stays has a row."""
        return stored_tensors(self.inner) - len(self.tier_shares)

    @property
    def shares(self) -> tuple[int, ...]:
        """Of ``PARTS`` tokens of a prompt, how many have a row in each tensor but the levels."""
        stay = PARTS - self.evicted
        return (stay,) * self._whole + tuple(stay * share // PARTS for share in self.tier_shares)

    @property
    def later_shares(self) -> tuple[int, ...]:
        """The same of tokens that come later: all stay."""
        return (PARTS,) * self._whole + self.tier_shares

    def payload_fields(self, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], ...]:
        """Levels, and what the code inside has."""
        inside = without_levels(self.inner, self.inner.payload_fields(dtype))
        return ((1, torch.uint8), *inside)

    def encode(
        self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Every token has a row in every tensor here."""
        payload = self.inner.encode(x, params, positions, self._inner_levels(levels))
        return self._outside(payload, levels)

    def encode_and_judge(
        self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> tuple[list[Tensor], Judged | None]:  # fmt: skip
        """By the code inside; what it says of tokens that are dropped means nothing."""
        payload, judged = self.inner.encode_and_judge(
            x, params, positions, self._inner_levels(levels)
        )
        return self._outside(payload, levels), judged

    def decode(
        self, payload: Sequence[Tensor], params: Sequence[Tensor], dtype: torch.dtype,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """By the code inside; dropped tokens are the mean."""
        x = self.inner.decode(self._inside(payload), params, dtype, positions)  # [B, H, T, D]
        work = working_dtype(dtype)
        mean = params[0].to(work).reshape(self.heads, 1, self.dim).expand(x.shape)
        mean = self._turned(mean, params, positions, 1).to(dtype)
        absent = self.absent(payload)
        assert absent is not None
        return torch.where(absent[:, None, :, None], mean, x)

    def scores(
        self, q: Tensor, payload: Sequence[Tensor], params: Sequence[Tensor],
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """By the code inside; those of dropped tokens mean nothing."""
        return self.inner.scores(q, self._inside(payload), params, positions)

    def mix(self, p: Tensor, payload: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """By the code inside; dropped tokens must have no weight."""
        return self.inner.mix(p, self._inside(payload), params)

    def _inner_levels(self, levels: Tensor | None) -> Tensor | None:
        """Levels of the code inside."""
        if levels is None or not self.tier_shares:
            return None
        return (levels.to(torch.int16) - self._whole).clamp_min(0).to(torch.uint8)

    def _outside(self, inside: list[Tensor], levels: Tensor | None) -> list[Tensor]:
        if levels is None:
            highest = self._whole + len(self.tier_shares)
            levels = inside[0].new_full(inside[0].shape[:2], highest, dtype=torch.uint8)
        return [levels[..., None], *without_levels(self.inner, inside)]

    def _inside(self, payload: Sequence[Tensor]) -> list[Tensor]:
        levels, *inside = payload
        own = self._inner_levels(levels)
        return inside if own is None else with_levels(self.inner, inside, own[..., 0])


@cache
def _inner(layout: EvictingLayout) -> TransformLayout:
    kind = TieredLayout if layout.plane1 else TransformLayout
    return kind(**{f.name: getattr(layout, f.name) for f in fields(kind)})


def evicting(layout: TransformLayout, evicted: int) -> TransformLayout:
    """The same code for the tokens that stay; ``layout`` itself if none is dropped.

    Args:
        layout: plain, or in tiers.
        evicted: of ``PARTS`` tokens of a prompt, how many are dropped.
    """
    if not evicted:
        return layout
    return EvictingLayout(
        **{f.name: getattr(layout, f.name) for f in fields(layout)}, evicted=evicted
    )
