"""Time of packed attention in one decode step, as an expression of batch B and coded tokens C.

Each launch takes ``launch + max(bytes / bandwidth, work)`` (roofline):

    launch   bytes                                                    work
    fold     basis of the keys                                        none
    attend   codes of C tokens; ring and pool; what splits leave      conversions
    merge    what splits left; basis of the values                    none

Conversions are those of the program that has the most tiles, of as many as run at once: one that
is alone on its multiprocessor waits for itself just as long. Ring and pool count as tiles where
programs over codes do them (``kernels/triton/shares.py``). Runs of codes count as wide as their
tiles are. Sizes and splits are those of ``kernels/triton/plan.py`` and ``launch.py``.

Keys that were coded before their rotation take ``basis`` in place of ``fold``, and products that
rebuild them; each program over codes reads the basis of its head. Codes by kind are attended one
after the other. Launches that rows of their own take are in ``listed.py``.
"""

from __future__ import annotations

from functools import cache, lru_cache

import sympy

from ..kernels.triton.plan import (
    MOST_SPLITS,
    Config,
    Plan,
    default_config,
    make_plan,
    shared_bytes,
    supported,
)
from ..kernels.triton.rows import MOST_TAILS, TAIL_TILES, is_listed
from .device import Device
from .launch import Launch
from .listed import EXACT, prepare, rank, slots_of, spread, value_slots
from .parts import Part, parts_of
from .sizes import PackedSide
from .symbols import BATCH, CODED, FIRST, Expr, value_of

FLOAT = 4
"""Bytes of a number that splits leave."""

HALF = 2
"""Bytes of a number of one of the bases."""

ENTRY = 8
"""Bytes of an entry that the loop over rows reads: its token, and the row of its value."""

MOST_SHARED = 227 << 10
"""Shared memory that a program may have on the devices that are known."""


def is_predicted(k: PackedSide, v: PackedSide) -> bool:
    """Whether the model knows the kernels of these codes: fitted ones in 16 bits.

    It does not know values in tiers whose rows are listed (with evictions, exact shares or by
    kind): their programs over tokens spill registers, of which it knows nothing.
    """
    if bool(k.layout.plane_kinds) != bool(v.layout.plane_kinds) or v.layout.positional:
        return False
    if not all(
        supported(side.layout) and side.layout.param_count > 0 and side.dtype.itemsize == HALF
        for side in (k, v)
    ):
        return False
    keys, values = parts_of(k), parts_of(v)
    if any(shared_bytes(part.layout) > MOST_SHARED for part in keys):
        return False
    tiered = any(part.planes for part in values)
    listed = is_listed(k.layout, v.layout)
    return not (tiered and listed) and not any(part.planes for part in keys)


def beside_of(plan: Plan, config: Config, device: Device, rows: Expr = CODED) -> Expr:
    """``launch.exact_beside`` as an expression."""
    if not config.beside:
        return sympy.Integer(0)
    tiles = BATCH * plan.groups * plan.blocks * _tiles(rows, config)
    slots = device.multiprocessors * config.fill
    return sympy.Min(sympy.floor(tiles / (slots * config.beside)), 1)


def splits_of(
    plan: Plan, config: Config, device: Device, rows: Expr = CODED, tails: Expr = 0
) -> Expr:
    """``launch.count_splits`` as an expression.

    Args:
        plan, config: of the launch.
        device: where it runs.
        rows: of the keys.
        tails: programs over slots.
    """
    slots = device.multiprocessors * config.fill
    exact = sympy.Min(BATCH * plan.exact_programs, slots - int(slots * config.share))
    rest = slots - (1 - beside_of(plan, config, device, rows)) * exact
    room = sympy.floor(rest / (BATCH * plan.groups * plan.blocks)) - tails
    return sympy.Max(sympy.Min(room, _tiles(rows, config), MOST_SPLITS), 1)


@cache
def launches(
    k: PackedSide, v: PackedSide, q_heads: int, queries: int, device: Device
) -> tuple[Launch, ...]:
    """The kernels of one layer, in order.

    Those that Inductor makes beside ours are named for what they leave: ``table``, ``lengths`` (of
    the second kind), ``together`` (the results of both).

    Args:
        k, v: its sides.
        q_heads, queries: of the step.
        device: where it runs.
    """
    pairs = list(zip(parts_of(k), parts_of(v), strict=True))
    found = rank(k, v, device)
    for kind, (of_keys, of_values) in enumerate(pairs):
        found += spread(of_values)
        if is_listed(k.layout, v.layout):
            found.append(prepare(k, v, of_keys.rows, device))
        if kind:
            found.append(Launch("lengths"))
        found += _attended((k, v), (of_keys, of_values), (q_heads, queries), not kind, device)
    if len(pairs) > 1:
        numbers = (len(pairs) + 1) * (v.layout.dim + 1)
        found.append(Launch("together", BATCH * q_heads * queries * numbers * FLOAT))
    return tuple(found)


def _attended(
    sides: tuple[PackedSide, PackedSide], parts: tuple[Part, Part], rows: tuple[int, int],
    first: bool, device: Device,
) -> list[Launch]:  # fmt: skip
    """The launches of one pair of plain codes. rows: query heads, queries. first: has the ring."""
    k, v = sides
    key, value = (part.layout for part in parts)
    q_rows = rows[0] * rows[1]
    config = default_config(key.spec, value.spec, q_rows)
    listed = is_listed(k.layout, v.layout)
    slots = [slots_of(side) for side in sides]
    pools = (0, 0) if listed else (int(slots[0]), int(slots[1]))
    plan = make_plan(
        key.spec, value.spec, *rows, pools, k.policy.ring, config, listed, parts[1].planes > 0
    )
    c = plan.attend
    many = sum(slots) / sympy.Integer(config.tokens)
    tails = sympy.Min(sympy.ceiling(many / TAIL_TILES), MOST_TAILS) if listed else 0
    splits = splits_of(plan, config, device, parts[0].rows, tails)
    left = BATCH * q_rows * (splits + tails + plan.exacts) * (c["VW"] + c["STATS"]) * FLOAT
    ring = k.policy.ring if first else 0
    exact = sum((pool + ring) * x.dim for pool, x in zip(pools, (key, value), strict=True))
    read = sum(part.rows * part.token for part in parts) + ENTRY * listed * parts[0].rows
    moved = BATCH * (read + key.heads * exact * EXACT) + left

    pieces = -(-plan.pieces // plan.blocks) * c["PIECE"]
    pieces *= beside_of(plan, config, device, parts[0].rows)
    tiles = sympy.ceiling((_tiles(parts[0].rows, config) + pieces) / splits)
    if listed:
        tiles = sympy.Max(tiles, sympy.ceiling(sympy.ceiling(many) / tails))
    widths = [sum(8 // bits * c[f"{x}P{bits}"] for bits in (8, 4, 2)) for x in "KV"]
    at_once = device.multiprocessors * config.fill
    work = sum(widths) / device.conversions
    before = [Launch("fold", c["KW"] * key.heads * key.dim * HALF)]
    if key.positional:
        channels = 2 * c["KHALF"]
        work += widths[0] * channels / device.products
        basis = c["KW"] * channels * HALF
        moved += BATCH * plan.groups * plan.blocks * (splits + tails) * basis
        before = [Launch("table"), Launch("basis", key.heads * (c["KW"] * key.dim * HALF + basis))]
    return [
        *before,
        Launch("attend", moved, tiles * config.tokens * at_once * work),
        *([value_slots(v, device)] if listed else []),
        Launch("merge", left + c["VW"] * value.heads * value.dim * HALF),
    ]


def _tiles(rows: Expr, config: Config) -> Expr:
    return sympy.ceiling(rows / sympy.Integer(config.tokens))


@lru_cache(maxsize=1024)
def seconds_of(
    k: PackedSide, v: PackedSide, q_heads: int, device: Device, batch: int, coded: int,
    queries: int = 1, first: int | None = None,
) -> float:  # fmt: skip
    """Time of packed attention of one layer in one step.

    Args:
        k, v: its sides.
        q_heads: query heads.
        device: where it runs.
        batch: sequences.
        coded: tokens that are coded; those that were dropped count.
        queries: new tokens of the step.
        first: of the coded ones, those of the prompt: none of the later ones is dropped, and all
            are text. None: all are of the prompt.
    """
    values = {BATCH: batch, CODED: coded, FIRST: coded if first is None else first}
    return sum(
        value_of(launch.seconds(device), values)
        for launch in launches(k, v, q_heads, queries, device)
    )
