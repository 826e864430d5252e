"""Launches around those that every step has, where rows of codes are not simply tokens.

Ranks and lists move few bytes, but their loops read before they go on: such a turn is a wait for
memory, and the longest program has so many of them:

    launch        bytes                                        turns
    rank          levels; a row of each counted plane          C / 2048: all levels before the last
                                                               tokens, by itself
    spread        bits in tiers; their ranks; plain codes      none
    prepare       ranks; three numbers an entry; pool of keys  slots / 64 of both pools, and 2 to
                                                               find what a slot belongs to
    value_slots   pool of values                               slots / 64 of the pool of values

Sizes are those of ``kernels/triton/ranks.py``, ``spread.py``, ``listing.py`` and ``slots.py``.
"""

from __future__ import annotations

import sympy

from ..kernels.triton.rows import LEVELS_AT_ONCE, SLOTS_AT_ONCE, counted_planes, most_planes
from .device import Device
from .launch import Launch
from .parts import Part
from .sizes import PackedSide
from .symbols import BATCH, CODED, Expr

NUMBER = 4
"""Bytes of a rank, and of each of the three numbers of an entry."""

EXACT = 2
"""Bytes of an exact number, as the kernels attend in 16 bits."""


def slots_of(side: PackedSide) -> Expr:
    """Slots of the pool of one side."""
    return side.policy.sinks + side.layout.slots(side.policy.extra, CODED)


def rank(k: PackedSide, v: PackedSide, device: Device) -> list[Launch]:
    """Which row of which plane belongs to which token, where there are planes."""
    each = [counted_planes(side.layout) for side in (k, v)]
    counts = [len(counted) * most_planes(counted) for counted in each]
    if not any(counts):
        return []
    moved = sum(BATCH * CODED * (1 + NUMBER * count) for count in counts if count)
    return [Launch("rank", moved, _turns(CODED, LEVELS_AT_ONCE) * device.wait)]


def spread(part: Part) -> list[Launch]:
    """Values in tiers as a plain code, and a byte that says how many bits a row lacks."""
    if not part.planes:
        return []
    return [Launch("spread", BATCH * (part.rows * part.spread + CODED * NUMBER * part.planes))]


def prepare(k: PackedSide, v: PackedSide, rows: Expr, device: Device) -> Launch:
    """Which rows belong together, and scores of the pool of keys. rows: of the keys."""
    slots = [slots_of(side) for side in (k, v)]
    members = sum(side.layout.lacks_rows for side in (k, v))
    entries = 3 * (rows + sum(slots)) + members * CODED
    moved = BATCH * (NUMBER * entries + k.layout.heads * slots[0] * k.layout.dim * EXACT)
    turns = sum(_turns(n, SLOTS_AT_ONCE) for n in slots) + 2
    return Launch("prepare", moved, turns * device.wait)


def value_slots(v: PackedSide, device: Device) -> Launch:
    """The pool of values, by the scores that the kernel over tokens left."""
    slots = slots_of(v)
    moved = BATCH * v.layout.heads * slots * v.layout.dim * EXACT
    return Launch("value_slots", moved, _turns(slots, SLOTS_AT_ONCE) * device.wait)


def _turns(count: Expr, at_once: int) -> Expr:
    return sympy.ceiling(count / sympy.Integer(at_once))
