"""Planes: payload tensors with rows for some tokens only, in the order of the tokens.

The token of level l has a row in planes 1 to l; where planes are of kinds of tokens, in those of
its kind that its level is high enough for (:func:`members`). Which row is counted, not stored: as
many as there are tokens in the plane before it. Tokens that are cropped away leave no gap, and
those that come next take their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..codec import Layout
from ..codec.layout import PARTS, TOP_LEVEL


def quotas(
    layout: Layout, tokens: Any, later: bool = False, kinds: Sequence[int] | None = None
) -> list[Any]:
    """Rows in each plane for so many tokens of a sequence that are coded together.

    Args:
        layout: of the code.
        tokens: of a prompt; or, ``later``, of those that come behind it.
        later: which.
        kinds: of a prompt, how many of the tokens are of each kind; None: all are of the first.
    """
    if layout.plane_kinds and not later:
        every = (tokens, 0) if kinds is None else kinds
        pairs = zip(layout.shares, layout.plane_kinds, strict=True)
        return [rows_of(share, every[kind]) for share, kind in pairs]
    shares = layout.later_shares if later else layout.shares
    return [rows_of(share, tokens) for share in shares]


def capacities(layout: Layout, rows: Sequence[Any], chunk: int) -> list[Any]:
    """Rows that a prompt's planes of kinds have room for.

    Args:
        layout: of the code.
        rows: of each kind, those that a plane of all of its tokens has room for.
        chunk: of which all are multiples.
    """
    pairs = zip(layout.shares, layout.plane_kinds, strict=True)
    return [
        rows[kind] if share == PARTS else capacity_for(rows_of(share, rows[kind]), chunk)
        for share, kind in pairs
    ]


def rows_of(share: int, tokens: int | Tensor) -> Any:
    """Of so many tokens, those that a share of ``PARTS`` stands for: rounded up."""
    return (share * tokens + PARTS - 1) // PARTS


def capacity_for(rows: int, chunk: int) -> int:
    """Rows that a payload tensor has room for, so that ``rows`` fit."""
    return torch.sym_max((rows + chunk - 1) // chunk, 1) * chunk


def token_levels(importance: Tensor, shares: Sequence[int]) -> Tensor:
    """The levels of tokens: uint8 ``[B, T]``. The meaning of ``apack::token_levels``.

    Args:
        importance: ``[B, T]``; tokens with a negative one do not count and are of level 0.
        shares: of ``PARTS`` tokens that count, how many are in plane 1, 2, ...; descending.
    """
    order = importance.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(importance.shape[1], device=importance.device).expand_as(order)
    rank = torch.zeros_like(order).scatter(1, order, place)  # [B, T]
    tokens = (importance >= 0).sum(1, keepdim=True)
    levels = torch.zeros_like(rank)
    for share in shares:
        levels = levels + (rank < rows_of(share, tokens))
    return levels.to(torch.uint8)


def later_levels(sizes: Tensor, layout: Layout) -> Tensor:
    """The levels of tokens of ``sizes [B, T]`` that come behind a prompt: uint8 ``[B, T]``."""
    if not layout.later_steps:
        return torch.zeros_like(sizes, dtype=torch.uint8)
    return torch.ops.apack.token_levels(sizes, layout.later_steps)


def members(layout: Layout, levels: Tensor, plane: int) -> Tensor:
    """Which tokens have a row in a plane (from 1 on): bool, of the shape of ``levels``."""
    first, last = layout.plane_levels[plane - 1]
    has = levels >= first
    return has if last == TOP_LEVEL else has & (levels <= last)


def counted(layout: Layout, levels: Tensor, plane: int, end: int | Tensor) -> Tensor:
    """Rows of a plane that belong to the first ``end`` tokens: ``[B, 1]`` int64.

    Args:
        layout: of the code.
        levels: ``[B, C, 1]``, as they are stored.
        plane, end: which.
    """
    there = torch.arange(levels.shape[1], device=levels.device) < end
    return (members(layout, levels[..., 0], plane) & there).sum(1, keepdim=True)


def in_plane(rows: Tensor, has: Tensor, count: int) -> Tensor:
    """The rows of a plane: ``[B, count, width]``, those of tokens in the plane first.

    Args:
        rows: of each token, ``[B, T, width]``.
        has: ``[B, T]`` bool: tokens that are in the plane, at most ``count`` of a sequence.
        count: rows wanted.
    """
    return rows_at(rows, (~has).to(torch.uint8).argsort(dim=1, stable=True)[:, :count])


def rows_at(rows: Tensor, tokens: Tensor) -> Tensor:
    """Of rows ``[B, T, width]`` those of ``tokens [B, R]``: ``[B, R, width]``."""
    return rows.gather(1, tokens[..., None].expand(-1, -1, rows.shape[2]))


def padded(rows: Tensor, capacity: int) -> Tensor:
    """A payload tensor that begins with ``rows [B, R, width]``: ``[B, capacity, width]``."""
    return torch.nn.functional.pad(rows, (0, 0, 0, capacity - rows.shape[1])).contiguous()


def filled_planes(
    parts: Sequence[Tensor], levels: Tensor, layout: Layout, coded: int, chunk: int
) -> list[Tensor]:
    """The planes of a prompt.

    Args:
        parts: of each plane a row for every token, ``[B, S, width]``.
        levels: of the tokens ``[B, S]``; those behind ``coded`` are in no plane.
        layout: of the code.
        coded: tokens that are coded.
        chunk: planes have room for a multiple of it.
    """
    planes = []
    for plane, (part, quota) in enumerate(zip(parts, quotas(layout, coded), strict=True), 1):
        rows = in_plane(part, members(layout, levels, plane), quota)
        planes.append(padded(rows, capacity_for(quota, chunk)))
    return planes


def planes_by_kind(
    parts: Sequence[Tensor], levels: Tensor, layout: Layout, coded: int, tokens: Sequence[Tensor],
    chunk: int,
) -> list[Tensor]:  # fmt: skip
    """The planes of a prompt, where each is of one kind of tokens.

    Args:
        parts, levels, layout, coded, chunk: see :func:`filled_planes`; tokens behind ``coded`` may
            be of any level.
        tokens: of each kind ``[B, R]``: those of the kind that are coded first.
    """
    planes = []
    room = capacities(layout, [t.shape[1] for t in tokens], chunk)
    for plane, (part, share) in enumerate(zip(parts, layout.shares, strict=True), 1):
        kind = layout.plane_kinds[plane - 1]
        rows = rows_at(part, tokens[kind])  # [B, R, width]
        if share < PARTS:
            own = levels.gather(1, tokens[kind])  # [B, R]
            there = _first(layout, levels, kind, coded, own.shape[1])
            has = members(layout, own, plane) & there
            rows = padded(in_plane(rows, has, rows_of(share, own.shape[1])), room[plane - 1])
        planes.append(rows)
    return planes


def _first(layout: Layout, levels: Tensor, kind: int, coded: int, rows: int) -> Tensor:
    """Of ``rows`` rows, those of the coded tokens of a kind, which come first: ``[B, rows]``."""
    kinds = layout.kinds_of(levels)  # [B, S]
    assert kinds is not None
    here = torch.arange(levels.shape[1], device=levels.device) < coded
    count = ((kinds == kind) & here).sum(1, keepdim=True)
    return torch.arange(rows, device=levels.device) < count


def write_rows(plane: Tensor, rows: Tensor, first: Tensor) -> None:
    """Write ``rows [B, N, width]`` into ``plane [B, R, width]`` from row ``first [B, 1]`` on."""
    index = first + torch.arange(rows.shape[1], device=plane.device)
    plane.scatter_(1, index[..., None].expand_as(rows), rows)


def write_later(
    payload: Sequence[Tensor], parts: Sequence[Tensor], levels: Tensor, layout: Layout,
    start: int | Tensor,
) -> None:  # fmt: skip
    """Write the rows of tokens that come behind a prompt into their planes.

    Args:
        payload: as it is stored; the tokens' levels are there already.
        parts: what was coded, with a row for each of the tokens.
        levels: of the tokens ``[B, T]``.
        layout: of the code.
        start: of the first token.

    Each plane has as many rows more then as :func:`quotas` says.
    """
    end = layout.tokenwise
    for plane, count in enumerate(quotas(layout, levels.shape[1], later=True), 1):
        first = counted(layout, payload[end - 1], plane, start)
        has = members(layout, levels, plane)
        write_rows(payload[end + plane - 1], in_plane(parts[end + plane - 1], has, count), first)


def spread(payload: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """The payload with a row for every token in every plane.

    Those that are in none read any, but for floating-point numbers, which are 0: a weight of 0
    times a number that is stale must not reach the output.
    """
    if not layout.shares:
        return list(payload)
    tokenwise, rows = payload[: layout.tokenwise], payload[layout.tokenwise :]
    levels = tokenwise[-1][..., 0]  # [B, C]
    whole = list(tokenwise)
    for plane, held in enumerate(rows, 1):
        has = members(layout, levels, plane)
        index = (has.cumsum(1) - 1).clamp(0, held.shape[1] - 1)
        read = held.gather(1, index[..., None].expand(-1, -1, held.shape[2]))
        whole.append(torch.where(has[..., None], read, 0.0) if read.is_floating_point() else read)
    return whole
