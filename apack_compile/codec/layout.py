"""The contract of a code: a static layout, free functions of tensors, nothing about graphs.

A :class:`Layout` says how one side (K or V) of one layer is stored and knows five things:
encode, decode, absorbed scores, absorbed mixing, bytes. It holds no tensors. What was fitted
(means, bases) comes as ``params``, a list of tensors whose meaning is the layout's own. Layouts
are frozen, hashable and round-trip through a short text (``spec``), which is what graphs carry.

Shapes: B batch, H KV heads, Hq query heads (a multiple of H), T tokens, Q queries, D head_dim.
A layout that is ``positional`` wants the positions ``[B|1, T]`` of the tokens that it codes, and
the same positions whenever it reads them. A layout may have *planes*, payload tensors with rows for
some tokens only: the last ones, one for each of its ``shares``. The one before them then holds the
levels of the tokens, and each plane has the rows of those whose levels are among its
``plane_levels``: one of level l is in planes 1 to l; or each plane is of one kind of tokens
(``plane_kinds``), and levels say of which kind a token is as well. Layouts themselves see planes
with a row for every token; who stores them leaves rows out and puts them back
(``kernels/planes.py``). A layout may want some of its tokens to stay exact; who stores them has
slots for as many (``kernels/pool.py``). And it may drop some: who attends hides what is ``absent``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

PARTS = 32
"""Shares of tokens are multiples of one part in so many: a block fills them evenly."""

KEPT_OF = 1024
"""Shares of tokens that stay exact are counted in one of so many."""

STRAINED = 16.0
"""A token whose error is so many times the expected one stays exact, while there is a slot."""

TOP_LEVEL = 254
"""The highest level that a token may have; kernels take 255 for that of no token."""

SPARE = 4
"""Slots that only tokens that are not finite may take."""

_KINDS: dict[str, type[Layout]] = {}


class Judged(NamedTuple):
    """How well tokens are coded, in the metric that the code is best in.

    Attributes:
        error: squared error of each token ``[B, T]``, over the mean error on the tokens that the
            code was fitted on: 1 is as expected.
        size: squared size, in the same unit.
        strain: how much the token wants to stay exact: the error over what is expected of this very
            token (less of one with fewer bits), or what else the layout goes by.
    """

    error: Tensor
    size: Tensor
    strain: Tensor


@dataclass(frozen=True)
class Layout(ABC):
    """How one side of one layer is stored.

    Attributes:
        heads: KV heads H.
        dim: head_dim D.
    """

    heads: int
    dim: int

    kind: ClassVar[str]

    @property
    def positional(self) -> bool:
        """Whether codes depend on the position of a token."""
        return False

    @property
    def per_sequence(self) -> bool:
        """Whether the first parameter has a row for each sequence, and belongs to the cache."""
        return False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        _KINDS[cls.kind] = cls

    @property
    def shares(self) -> tuple[int, ...]:
        """Of ``PARTS`` tokens, how many have a row in plane 1, 2, ...; empty: no planes.

        Where planes are of kinds: of the tokens of its kind.
        """
        return ()

    @property
    def tier_shares(self) -> tuple[int, ...]:
        """Of ``PARTS`` tokens, how many have one bit more, two, ...; empty: all have all bits."""
        return ()

    @property
    def tracks_importance(self) -> bool:
        """Whether bits of later tokens go by the attention that they receive in the ring."""
        return bool(self.tier_shares)

    @property
    def later_shares(self) -> tuple[int, ...]:
        """The same of tokens that are coded behind the prompt."""
        return self.shares

    @property
    def later_steps(self) -> tuple[int, ...]:
        """Of ``PARTS`` tokens that come later, how many are above level 0, 1, ..."""
        return self.later_shares

    @property
    def weighs(self) -> bool:
        """Whether it matters which tokens of a prompt received most attention."""
        return bool(self.shares)

    @property
    def plane_levels(self) -> tuple[tuple[int, int], ...]:
        """Of each plane, the lowest and the highest level of the tokens that have a row in it."""
        return tuple((plane, TOP_LEVEL) for plane in range(1, len(self.shares) + 1))

    @property
    def plane_kinds(self) -> tuple[int, ...]:
        """Of each plane, the kind of the tokens that are in it; empty: it is nothing to planes."""
        return ()

    @property
    def by_kind(self) -> tuple[Layout, ...]:
        """The code of each kind of tokens, text first; of a layout without kinds, itself."""
        return (self,)

    @property
    def first_levels(self) -> tuple[int, ...]:
        """The lowest level of each kind."""
        return (0,)

    @property
    def plain(self) -> Layout:
        """The code of tokens that are in no pool and have all bits: without planes."""
        return self

    @property
    def lacks_rows(self) -> bool:
        """Whether tokens may have no row: they are dropped, or of another kind."""
        return bool(self.plane_kinds) or self.evicts > 0

    def kinds_of(self, levels: Tensor | None) -> Tensor | None:
        """The kinds of tokens of ``levels``; None: there is one code for all kinds."""
        return None

    @property
    def evicts(self) -> int:
        """Of ``PARTS`` tokens of a prompt, how many are dropped for good."""
        return 0

    def lacks(self, levels: Tensor) -> Tensor:
        """Bits that tokens of ``levels`` lack: int64; -1 of tokens that were dropped."""
        steps, tiers = len(self.shares), len(self.tier_shares)
        if not steps:
            return torch.zeros_like(levels, dtype=torch.int64)
        lacking = steps - levels.long()
        return torch.where(lacking > tiers, -1, lacking)

    @property
    def dropped_level(self) -> int | None:
        """The level of tokens that were dropped; None: this layout drops none."""
        return 0 if self.evicts else None

    def absent(self, payload: Sequence[Tensor]) -> Tensor | None:
        """Tokens that were dropped: ``[B, T]`` bool; None: this layout drops none."""
        dropped = self.dropped_level
        return None if dropped is None else payload[self.tokenwise - 1][..., 0] == dropped

    @property
    def tokenwise(self) -> int:
        """Payload tensors with a row for every token; planes are behind them."""
        return len(self.payload_fields(torch.float32)) - len(self.shares)

    @property
    def kept(self) -> int:
        """Of ``KEPT_OF`` tokens, how many stay exact; 0: only those that strain the code."""
        return 0

    def slots(self, extra: int, tokens: Any) -> Any:
        """Slots on demand for ``tokens``: ``extra``, or those of the share and some spare ones."""
        return SPARE + self.kept * tokens // KEPT_OF if self.kept else extra

    @property
    def strained(self) -> float:
        """A token whose strain is greater stays exact, while there is a slot."""
        return 0.0 if self.kept else STRAINED

    @property
    @abstractmethod
    def param_count(self) -> int:
        """How many tensors ``params`` has."""

    @cached_property  # every step asks for it
    def spec(self) -> str:
        """A text that :func:`parse_layout` turns back into this layout."""
        values = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return f"{self.kind}:" + ",".join(
            f"{name}={value}" for name, value, default in values if value != default
        )

    @abstractmethod
    def payload_fields(self, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], ...]:
        """Width and dtype of each payload tensor ``[B, T, width]`` for a cache of ``dtype``."""

    def token_bytes(self, dtype: torch.dtype) -> float:
        """Bytes that one coded token of one sequence takes, in the mean."""
        fields_ = self.payload_fields(dtype)
        rows = [PARTS] * self.tokenwise + list(self.shares)
        sizes = (width * kind.itemsize for width, kind in fields_)
        return sum(size * share for size, share in zip(sizes, rows, strict=True)) / PARTS

    @abstractmethod
    def encode(
        self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Code ``x [B, H, T, D]`` into payload tensors ``[B, T, width]``.

        Tokens of a layout with planes are of ``levels [B, T]`` uint8 (None: the highest), and
        every plane has a row for each of them here.
        """

    @abstractmethod
    def decode(
        self, payload: Sequence[Tensor], params: Sequence[Tensor], dtype: torch.dtype,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Payload tensors back to ``[B, H, T, D]`` in ``dtype``."""

    def encode_and_judge(
        self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> tuple[list[Tensor], Judged | None]:  # fmt: skip
        """:meth:`encode`, and how well; None if nothing is to be expected of the code."""
        return self.encode(x, params, positions, levels), None

    @abstractmethod
    def scores(
        self, q: Tensor, payload: Sequence[Tensor], params: Sequence[Tensor],
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``q [B, Hq, Q, D]`` against coded keys: ``[B, Hq, Q, T]``."""

    @abstractmethod
    def mix(self, p: Tensor, payload: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """Weights ``p [B, Hq, Q, T]`` times coded values, decoded once: ``[B, Hq, Q, D]``."""


def tiers_of(shares: Sequence[int]) -> tuple[tuple[float, int], ...]:
    """Of each level, from the lowest: its share of the tokens, and the planes that it lacks."""
    bounds = [PARTS, *shares, 0]
    return tuple(
        ((more - less) / PARTS, len(shares) - level)
        for level, (more, less) in enumerate(pairwise(bounds))
    )


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of ``dtype`` is coded and attended: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def parse_layout(spec: str) -> Layout:
    """The layout that ``spec`` describes.

    Raises:
        ValueError: the text is not one that :attr:`Layout.spec` made.
    """
    kind, _, rest = spec.partition(":")
    cls = _KINDS.get(kind)
    if cls is None:
        raise ValueError(f"unknown code layout {kind!r} in {spec!r}; known: {sorted(_KINDS)}")
    try:
        values = {name: int(value) for name, value in (item.split("=") for item in rest.split(","))}
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"malformed code layout {spec!r}: {error}") from error


def scores_of_keys(q: Tensor, k: Tensor) -> Tensor:
    """``q [B, Hq, Q, D]`` against keys ``[B, H, T, D]``, query heads of a KV head side by side."""
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, H, Hq/H * Q, D]
    return (grouped @ k.transpose(-1, -2)).unflatten(2, (-1, q.shape[2])).flatten(1, 2)
