"""Codes as the kernel over tokens reads them: plain ones, whatever the layout of the cache.

A layout with planes (``kernels/planes.py``) is one or two plain codes with rows for some tokens,
once it is known which rows belong to which tokens (``ranks.py``, ``listing.py``); bits in tiers are
put together before (``spread.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...codec import Layout, ModalLayout, TieredLayout, TransformLayout
from ...codec.bits import CLASSES
from ...codec.kinds import KINDS
from ...codec.levels import without_levels
from ..side import Side
from .calls import kernel
from .plan import LEAST_BYTES, power
from .ranks import TOKENS, rank_kernel
from .rows import LEVELS_AT_ONCE, NO_LEVEL, Counted, counted_planes, most_planes
from .spread import TILE, spread_kernel

MOST_PLANES = 4
"""Planes of tiers that ``spread_kernel`` knows."""


class Coded(NamedTuple):
    """One side of a layer in a plain code.

    Attributes:
        layout: plain.
        codes, gains: ``[B, R, width]``; gains are the codes again where there are none.
        params: of the code.
        lacks: bits that rows lack, ``[B, R]`` uint8; None: none do.
    """

    layout: Layout
    codes: Tensor
    gains: Tensor
    params: Sequence[Tensor]
    lacks: Tensor | None = None


class Ranks(NamedTuple):
    """Of planes of one side: rows of tokens, and how many.

    Attributes:
        rows: ``[B, kinds * planes, C]``; totals: ``[B, kinds * planes]``.
        planes: of one kind.
    """

    rows: Tensor
    totals: Tensor
    planes: int


def pairs(key: Layout, value: Layout) -> list[tuple[Layout, Layout]]:
    """Codes of keys and values of the tokens that have the same: one pair, or one of each kind."""
    return list(zip(key.by_kind, value.by_kind, strict=False))


def rank_planes(
    keys: Side, values: Side, key: Layout, value: Layout, lengths: Tensor
) -> tuple[Ranks | None, Ranks | None]:
    """Rows of tokens in the planes of both sides; None where there are none."""
    found: list[Ranks | None] = []
    args: list[Tensor] = []
    constants: dict[str, int] = {}
    batch, capacity = keys.payload[0].shape[:2]
    tiles = (capacity + TOKENS - 1) // TOKENS
    kinds = 1
    for letter, side, layout in (("K", keys, key), ("V", values, value)):
        counted = counted_planes(layout)
        most = most_planes(counted)
        kinds = max(kinds, len(counted))
        constants |= {f"{letter}PLANES": most, f"{letter}PAD": power(most, 1)}
        for number in range(KINDS):
            each = counted[number] if number < len(counted) else Counted(0, 0, NO_LEVEL, 0)
            names = (f"{letter}{name}{number or ''}" for name in ("FIRST", "LAST", "LOST"))
            constants |= dict(zip(names, each[:3], strict=True))
        if counted:
            args.append(side.payload[layout.tokenwise - 1].contiguous())
            planes = len(counted) * most
            rows = lengths.new_empty(batch, planes, capacity, dtype=torch.int32)
            totals = lengths.new_empty(batch, planes, dtype=torch.int32)
            found.append(Ranks(rows, totals, most))
        else:
            args.append(lengths)
            found.append(None)
    k_ranks, v_ranks = found
    if k_ranks is None and v_ranks is None:
        return None, None
    ranks = [lengths if r is None else r.rows for r in found]
    totals = [lengths if r is None else r.totals for r in found]
    each_side = batch * tiles * kinds
    of_keys = each_side if k_ranks is not None else 0
    programs = of_keys + (each_side if v_ranks is not None else 0)
    kernel(rank_kernel)[(programs,)](
        *args, lengths, *ranks, *totals, capacity, tiles, of_keys, **constants, KINDS=kinds,
        T=TOKENS, BLOCK=LEVELS_AT_ONCE, num_warps=4,
    )  # fmt: skip
    return k_ranks, v_ranks


def member_ranks(layout: Layout, ranks: Ranks | None) -> Ranks | None:
    """Ranks whose first planes say which tokens have a row; None: all have that of the token."""
    return ranks if layout.lacks_rows else None


def coded(side: Side, layout: Layout, ranks: Ranks | None, kind: int = 0) -> Coded:
    """The plain code of one side; of a layout with two, that of a kind of tokens."""
    payload: Sequence[Tensor] = [t.contiguous() for t in side.payload]
    params: Sequence[Tensor] = side.params
    code, whole = layout, not layout.evicts
    if isinstance(layout, ModalLayout):
        payload, params = layout.planes(payload)[kind], layout.parts(params)[kind]
        code, whole = layout.by_kind[kind], False
    else:
        payload = without_levels(layout, payload)
    if not code.tier_shares:
        return Coded(code.plain, payload[0], payload[-1], params)
    assert isinstance(code, TieredLayout) and ranks is not None
    planes = payload[-len(code.tier_shares) :]
    first = kind * ranks.planes
    codes, lacks = _spread(payload[0], planes, code, ranks, first, whole)
    return Coded(code.plain, codes, payload[1], params, lacks)


def _spread(
    base: Tensor, planes: Sequence[Tensor], layout: TieredLayout, ranks: Ranks, first: int,
    is_whole: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes in tiers as plain ones, and the bits that they lack.

    first: of their ranks; is_whole: every token has leading bits, of which there is no rank.
    """
    batch, rows = base.shape[:2]
    capacity, groups = ranks.rows.shape[2], layout.groups
    widths = [count * bits // 8 for bits, count in zip(CLASSES, _counts(layout), strict=True)]
    codes = base.new_empty(batch, rows, groups * sum(widths))
    lacks = base.new_empty(batch, rows)
    tiles = (capacity + TILE - 1) // TILE
    more = MOST_PLANES - len(planes)
    every = [*planes, *[base] * more]
    sizes = [p.shape[2] * 8 // groups for p in planes] + [32] * more
    constants: dict[str, Any] = {f"N{i}": size for i, size in enumerate(sizes, 1)}
    for bits, count, width in zip(CLASSES, _counts(layout), widths, strict=True):
        constants[f"R{bits}"] = count
        constants[f"P{bits}"] = power(width, LEAST_BYTES // 2)
    lead = base.shape[2] // groups
    digits = [count * size // 8 for bits, count in layout.runs for size in layout.digits(bits)]
    whole = all(n % 4 == 0 for n in (lead, *digits, *widths, *(size // 8 for size in sizes)))
    kernel(spread_kernel)[(batch * tiles * groups,)](
        base, *every, ranks.rows, codes, lacks, capacity, rows, *[p.shape[1] for p in every], tiles,
        G=groups, WIDTH=lead, PLANES=len(planes),
        WHOLE=int(is_whole), RANKS=ranks.rows.shape[1], RANK=first, T=TILE,
        WORD=4 if whole else 2, **constants, num_warps=4,
    )  # fmt: skip
    return codes, lacks


def _counts(layout: TransformLayout) -> tuple[int, int, int]:
    return layout.r8, layout.r4, layout.r2
