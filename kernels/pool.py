"""The pool: a few tokens of each sequence that stay exact whatever the code does.

Slots are reserved by position (attention sinks: the first visible tokens) or taken on demand, by
tokens that no code can hold (NaN, infinity) and by those that this code holds worst
(``Layout.strained``: far worse than it was made to, or as many as the layout has slots for), the
worst first. A reserved position may lie in the future; its value is filled in when that token is
coded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codec.layout import SPARE, STRAINED


def reserve_sinks(visible: Tensor | None, like: Tensor, sinks: int, extra: int) -> Tensor:
    """Positions ``[B, sinks + extra]``: the first ``sinks`` visible tokens, then free slots.

    Args:
        visible: ``[B, S]`` bool, or None if position 0 is the first visible token of each row.
        like: gives batch and device.
        sinks, extra: slots reserved and free.
    """
    batch = like.shape[0]
    offsets = torch.arange(sinks, device=like.device)
    if visible is None:
        first = offsets.new_zeros(batch, 1)
    else:
        first = visible.to(torch.int8).argmax(-1, keepdim=True)
    free = offsets.new_full((batch, extra), -1)
    return torch.cat([first + offsets, free], 1)


def fill_pool(
    pool: Tensor, positions: Tensor, x: Tensor, start: int | Tensor, visible: Tensor | None,
    strain: Tensor | None = None, strained: float = STRAINED, spare: int | Tensor = SPARE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Take what the pool wants from tokens that are being coded.

    Args:
        pool: ``[B, H, E, D]``; positions: ``[B, E]``.
        x: tokens ``[B, H, T, D]`` at positions ``start .. start + T``.
        visible: ``[B|1, T]`` or ``[T]``; tokens that no query sees need no slot on demand.
        strain: ``[B, T]``: how much each token wants to stay exact; None: nothing is expected.
        strained: those above it may have a slot.
        spare: free slots that strained tokens leave.

    Returns:
        The new pool and positions. Where non-finite tokens find no free slot, the last of those
        that have one becomes NaN as a whole: the row's output then is NaN, as it would be with the
        dense cache, instead of silently wrong, until that token is cropped away.
    """
    here = start + torch.arange(x.shape[2], device=x.device)
    known = positions[:, :, None] == here  # [B, E, T]
    broken = ~x.isfinite().all(-1).all(1)  # [B, T]
    free = positions < 0  # [B, E]
    most = torch.finfo(torch.float32).max  # less than infinity: broken tokens come first
    none = torch.zeros((), device=x.device)
    strain = none if strain is None else strain.nan_to_num(nan=most, posinf=most).to(x.device)
    demand = torch.where(broken, float("inf"), strain)  # [B, T]
    eligible = ~known.any(1) if visible is None else visible & ~known.any(1)
    broken = broken & eligible
    worst, which = torch.where(eligible, demand, 0.0).sort(dim=1, descending=True, stable=True)
    rank = torch.arange(1, x.shape[2] + 1, device=x.device)
    room = free.sum(1, keepdim=True)  # [B, 1]
    wanted = (worst == float("inf")) | (worst > strained) & (rank <= room - spare)
    turn = torch.zeros_like(which).scatter(1, which, torch.where(wanted, rank, -2))  # [B, T]
    order_free = torch.where(free, free.cumsum(1), -1)
    taken = order_free[:, :, None] == turn[:, None, :]  # [B, E, T]
    source = known | taken
    hit = source.any(-1)  # [B, E]
    index = source.to(torch.int8).argmax(-1)  # [B, E]
    picked = x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    pool = torch.where(hit[:, None, :, None], picked, pool)
    positions = torch.where(taken.any(-1), index + start, positions)
    overflow = broken.sum(1) > room[:, 0]  # [B]
    held = (positions >= 0) & ~pool.isfinite().all(-1).all(1)  # [B, E]
    last = torch.where(held, positions, -1).argmax(1, keepdim=True)  # slot 0 if there is none
    poison = overflow[:, None] & (torch.arange(pool.shape[2], device=x.device) == last)
    return torch.where(poison[:, None, :, None], float("nan"), pool), positions


def make_pool(
    x: Tensor, visible: Tensor | None, strain: Tensor | None, sinks: int, extra: int,
    strained: float = STRAINED,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The pool of a whole prefill ``x [B, H, S, D]``, and its positions: ``apack::make_pool``.

    Args:
        x: all tokens.
        visible: ``[B, S]`` bool, False for padding; None: all are seen.
        strain, strained: see :func:`fill_pool`.
        sinks, extra: slots for the first visible tokens, and on demand.
    """
    pool = x.new_zeros(x.shape[0], x.shape[1], sinks + extra, x.shape[3])
    positions = reserve_sinks(visible, x, sinks, extra)
    if not sinks + extra:
        return pool, positions
    return fill_pool(pool, positions, x, 0, visible, strain, strained)


def resized(pool: Tensor, positions: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The same pool in ``slots`` slots; if fewer, still in those in use and some spare ones."""
    more = slots - pool.shape[2]
    if more >= 0:
        pad = torch.nn.functional.pad
        return pad(pool, (0, 0, 0, more)), pad(positions, (0, more), value=-1)
    used = positions >= 0  # [B, E]
    order = used.to(torch.int8).argsort(dim=1, descending=True, stable=True)  # sinks stay in front
    most = int(used.sum(1).max()) if len(used) else 0  # a selection may have no rows
    order = order[:, : max(slots, most + SPARE)]
    index = order[:, None, :, None].expand(-1, pool.shape[1], -1, pool.shape[3])
    return pool.gather(2, index), positions.gather(1, order)


def override(dense: Tensor, positions: Tensor, values: Tensor, dim: int) -> Tensor:
    """Put pool ``values`` into ``dense`` along ``dim`` at their positions.

    Args:
        dense: 4-D, batch first, tokens along ``dim`` (2 or 3).
        positions: ``[B, E]``; slots that are free or lie beyond ``dense`` do nothing.
        values: as ``dense``, with E along ``dim``.

    An unused slot repeats what the first used one writes (or what is there already), so that no
    two slots write different values to one place.
    """
    used = in_reach(positions, dense.shape[dim])
    shape = (-1, 1, 1, positions.shape[1]) if dim == 3 else (-1, 1, positions.shape[1], 1)
    first, some = used.to(torch.int8).argmax(1, keepdim=True), used.any(1, keepdim=True)  # [B, 1]
    index = torch.where(used, positions, torch.where(some, positions.gather(1, first), 0))
    place = first.view(-1, 1, 1, 1)
    sizes = [-1 if d == 0 else 1 if d == dim else n for d, n in enumerate(values.shape)]
    repeat = torch.where(
        some.view(-1, 1, 1, 1), values.gather(dim, place.expand(sizes)), dense.narrow(dim, 0, 1)
    )
    written = torch.where(used.view(shape), values, repeat)
    return dense.scatter(dim, index.view(shape).expand_as(values), written)


def pooled_tokens(
    positions: Tensor, start: int | Tensor, count: int, which: Tensor | None = None
) -> Tensor:
    """Of the tokens ``start .. start + count``, those in a slot: ``[B, count]`` bool.

    Args:
        positions: of the slots ``[B, E]``, -1 for a free one.
        start, count: tokens wanted.
        which: ``[B, E]`` bool: slots that count; None: all.
    """
    place = positions - start
    held = (positions >= 0) & in_reach(place, count)
    place = torch.where(held if which is None else held & which, place, count)
    found = torch.zeros(len(positions), count + 1, dtype=torch.bool, device=positions.device)
    return found.scatter(1, place, torch.ones_like(place, dtype=torch.bool))[:, :count]


def in_reach(positions: Tensor, length: int | Tensor) -> Tensor:
    """Which slots are in use and lie within ``length`` tokens: ``[B, E]`` bool."""
    return (positions >= 0) & (positions < length)


def pooled_mass(p: Tensor, positions: Tensor) -> Tensor:
    """Attention weights ``p [B, Hq, Q, T]`` that fall on pool tokens: ``[B, Hq, Q, E]``."""
    used = in_reach(positions, p.shape[-1])
    index = torch.where(used, positions, 0)[:, None, None].expand(*p.shape[:-1], -1)
    return torch.where(used[:, None, None], p.gather(-1, index), 0.0)
