"""Rows that are not those of the tokens: what is counted of them, and in what portions.

Without Triton, so that the cost model can ask as well.
"""

from __future__ import annotations

from typing import NamedTuple

from ...codec import Layout
from ...codec.layout import TOP_LEVEL

LEVELS_AT_ONCE = 2048
"""Levels before its tile that a program of ``rank_kernel`` counts at a time."""

SLOTS_AT_ONCE = 64
"""Slots that a program looks at at a time."""

MOST_TAILS = 8
"""Programs over the slots of a group's pools, at most."""

TAIL_TILES = 4
"""Tiles of slots of one of them, if there are no more."""

NO_LEVEL = TOP_LEVEL
"""A level that no token of a code with planes has."""


class Counted(NamedTuple):
    """What ``rank_kernel`` counts of one kind; planes with rows for the same tokens count once.

    Attributes:
        first, last: the lowest levels of its planes go up from ``first``, the highest is ``last``.
        lost: the level of dropped tokens; one that no token has: none are.
        planes: how many.
    """

    first: int
    last: int
    lost: int
    planes: int


def counted_planes(layout: Layout) -> list[Counted]:
    """What is counted of each kind of tokens; empty: rows are those of the tokens."""
    whole = int(layout.lacks_rows)  # planes in which all tokens of a kind that stay have a row
    found = []
    for code, lowest in zip(layout.by_kind, layout.first_levels, strict=True):
        tiers, last = len(code.tier_shares), lowest + len(code.shares)
        lost = lowest if code.evicts else NO_LEVEL
        found.append(Counted(last - tiers + 1 - whole, last, lost, whole + tiers))
    return found if most_planes(found) else []


def most_planes(counted: list[Counted]) -> int:
    """Planes that each kind has room for."""
    return max((each.planes for each in counted), default=0)


def is_listed(key: Layout, value: Layout) -> bool:
    """Whether rows are listed: they are not those of the tokens, or many tokens are exact."""
    return any(layout.lacks_rows or layout.kept for layout in (key, value))
