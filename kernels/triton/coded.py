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

from ...codec import EvictingLayout, Layout, ModalLayout, TieredLayout, TransformLayout
from ...codec.bits import CLASSES
from ...codec.kinds import VISUAL
from ..side import Side
from .calls import kernel
from .plan import LEAST_BYTES, power
from .ranks import AT_ONCE, TOKENS, rank_kernel
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
    """Of planes of one side: rows of tokens ``[B, PLANES, C]``, and how many ``[B, PLANES]``."""

    rows: Tensor
    totals: Tensor


def ranked_planes(layout: Layout) -> tuple[int, int]:
    """FIRST and PLANES of ``rank_kernel``: of planes with rows for the same tokens one counts."""
    if layout.plane_kinds:
        return 0, 2
    if isinstance(layout, EvictingLayout):
        whole = len(layout.shares) - len(layout.tier_shares)
        return whole, 1 + len(layout.tier_shares)
    return 1, len(layout.shares)


def plain(layout: Layout) -> Layout:
    """The code of the tokens that are in no pool, with all bits."""
    if not isinstance(layout, TransformLayout):
        return layout
    names = ("heads", "dim", "groups", "r8", "r4", "r2", "gain", "rotary", "interleaved")
    return TransformLayout(**{name: getattr(layout, name) for name in names})


def plain_pairs(key: Layout, value: Layout) -> list[tuple[Layout, Layout]]:
    """Plain codes of keys and values of the tokens that have the same: one pair, or two kinds."""
    if isinstance(key, ModalLayout) and isinstance(value, ModalLayout):
        return [(key.text, value.text), (key.visual, value.visual)]
    return [(plain(key), plain(value))]


def is_listed(key: Layout, value: Layout) -> bool:
    """Whether rows are listed: they are not those of the tokens, or many tokens are exact."""
    return any(x.kept or x.evicts or x.plane_kinds for x in (key, value))


def rank_planes(
    keys: Side, values: Side, key: Layout, value: Layout, lengths: Tensor
) -> tuple[Ranks | None, Ranks | None]:
    """Rows of tokens in the planes of both sides; None where there are none."""
    found: list[Ranks | None] = []
    args: list[Tensor] = []
    constants: dict[str, int] = {}
    batch, capacity = keys.payload[0].shape[:2]
    tiles = (capacity + TOKENS - 1) // TOKENS
    for letter, side, layout in (("K", keys, key), ("V", values, value)):
        first, count = ranked_planes(layout)
        constants |= {f"{letter}FIRST": first, f"{letter}PLANES": count}
        constants[f"{letter}PAD"] = power(count, 1)
        if count:
            levels = side.payload[layout.tokenwise - 1].contiguous()
            args.append(levels)
            rows = lengths.new_empty(batch, count, capacity, dtype=torch.int32)
            found.append(Ranks(rows, lengths.new_empty(batch, count, dtype=torch.int32)))
        else:
            args.append(lengths)
            found.append(None)
    k_ranks, v_ranks = found
    if k_ranks is None and v_ranks is None:
        return None, None
    ranks = [lengths if r is None else r.rows for r in found]
    totals = [lengths if r is None else r.totals for r in found]
    of_keys = batch * tiles if k_ranks is not None else 0
    programs = of_keys + (batch * tiles if v_ranks is not None else 0)
    kinds = int(bool(key.plane_kinds))
    kernel(rank_kernel)[(programs,)](
        *args, lengths, *ranks, *totals, capacity, tiles, of_keys, **constants, KINDS=kinds,
        T=TOKENS, BLOCK=AT_ONCE, num_warps=4,
    )  # fmt: skip
    return k_ranks, v_ranks


def member_ranks(layout: Layout, ranks: Ranks | None) -> Ranks | None:
    """Ranks whose first planes say which tokens have a row; None: all have that of the token."""
    return ranks if layout.evicts or layout.plane_kinds else None


def coded(side: Side, layout: Layout, ranks: Ranks | None, kind: int = 0) -> Coded:
    """The plain code of one side; of a layout with two, that of a kind of tokens."""
    payload = [t.contiguous() for t in side.payload]
    if isinstance(layout, ModalLayout):
        planes, params = payload[1:], side.params
        inner, mine = layout.text, slice(layout.plane_kinds.count(VISUAL), None)
        of_mine = slice(layout.visual.param_count, None)
        if kind == VISUAL:
            inner, mine = layout.visual, slice(mine.start)
            of_mine = slice(of_mine.start)
        return Coded(inner, planes[mine][0], planes[mine][-1], params[of_mine])
    if isinstance(layout, EvictingLayout):
        payload = payload[1:]
    if layout.tier_shares:
        assert isinstance(layout, TieredLayout) and ranks is not None
        planes = payload[-len(layout.tier_shares) :]
        codes, lacks = _spread(payload[0], planes, layout, ranks)
        return Coded(plain(layout), codes, payload[1], side.params, lacks)
    return Coded(plain(layout), payload[0], payload[-1], side.params)


def _spread(
    base: Tensor, planes: Sequence[Tensor], layout: TieredLayout, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Codes in tiers as plain ones, and the bits that they lack."""
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
        WHOLE=int(not layout.evicts), T=TILE, WORD=4 if whole else 2, **constants, num_warps=4,
    )  # fmt: skip
    return codes, lacks


def _counts(layout: TransformLayout) -> tuple[int, int, int]:
    return layout.r8, layout.r4, layout.r2
