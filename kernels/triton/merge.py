"""Splits of one step put together, and values out of the space of their codes, in one launch.

A program takes some channels of some query rows of one head. For each row it adds up what the
splits left, all components at once, and multiplies the sum with the basis of the values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import component, offset


@triton.jit
def _slots(
    sums, stats, first, slots, cells, inside,
    STRIDE: tl.constexpr, STATS: tl.constexpr, VW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What some splits left of one row: references ``[TILE]``, sums ``[TILE, cells]``.

    sums, stats: of the row in the first slot.
    """
    slot = first + tl.arange(0, TILE)
    live = slot < slots
    m = tl.load(stats + slot * (STATS * STRIDE), mask=live, other=-float("inf"))
    x = tl.load(
        sums + slot[:, None] * (VW * STRIDE) + cells[None, :],
        mask=live[:, None] & inside[None, :], other=0.0,
    )  # fmt: skip
    return m, x


@triton.jit
def _added(
    m, x, sums, stats, slots, base_m, cells, inside,
    STRIDE: tl.constexpr, STATS: tl.constexpr, VW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The sum over all slots, relative to 2^base_m: ``[cells]``. m, x: of the first ones."""
    acc = tl.exp2(m - base_m)[:, None] * x
    for first in tl.range(TILE, slots, TILE, num_stages=3):
        m, x = _slots(sums, stats, first, slots, cells, inside, STRIDE, STATS, VW, TILE)
        acc += tl.exp2(m - base_m)[:, None] * x
    return tl.sum(acc, 0)


@triton.jit
def _five_sums(a, b, c, d, e, more_a, more_b, more_c, more_d, more_e):
    return a + more_a, b + more_b, c + more_c, d + more_d, e + more_e


@triton.jit
def _basis(
    synthesis, units, group, own, number, d, held, inside,
    WIDTH: tl.constexpr, VG: tl.constexpr, VW: tl.constexpr,
    V8: tl.constexpr, V4: tl.constexpr, V2: tl.constexpr,
):  # fmt: skip
    """The basis of some components, in the order of codes, ``[components, d]``; their units."""
    w = component(number, V8, V4, V2)
    first = synthesis + group * VW * WIDTH + own
    mask = held[:, None] & inside[None, :]
    basis = tl.load(first + w[:, None] * WIDTH + d[None, :], mask=mask, other=0.0)
    return basis, tl.load(units + (VG + group) * VW + w, mask=held, other=0.0)


@triton.jit
def _expanded(
    x, gained, lack8, lack4, lack2, number, basis, unit, V8: tl.constexpr, V4: tl.constexpr,
):  # fmt: skip
    """Sums of codes ``x [components]``, and what they lack, as a value: ``[d]``."""
    too_much = offset(number, V8, V4)
    lack = tl.where(number < V8, lack8, tl.where(number < V8 + 2 * V4, lack4, lack2))
    x = (x - gained * too_much + lack) * unit
    return tl.sum(x[:, None] * basis.to(tl.float32), 0)


@triton.jit
def merge_kernel(
    part, stats, exact, sinks, mean, synthesis, units, out, lse, splits, batch, each,
    H: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, STRIDE: tl.constexpr,
    VG: tl.constexpr, VX: tl.constexpr, DV: tl.constexpr, VW: tl.constexpr,
    V8: tl.constexpr, V4: tl.constexpr, V2: tl.constexpr,
    STATS: tl.constexpr, EXACTS: tl.constexpr, POOL: tl.constexpr, SINKS: tl.constexpr,
    LSE: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``out [B, H, ROWS, DV]`` of what ``attend_kernel`` left.

    With m the largest score of a row, f = 2^(m_slot - m) of each slot, and sums, gained (the mass
    of coded values times gains) and masses added up over slots with that factor,

        out  =  (f_ring ring  +  f_pool pool  +  (sums - offset gained + lack) synthesis
                 +  mass of coded values * mean)  /  mass

    With SINKS the score of its head's sink is one of the row's, and its mass one of all. lack: what
    codes lack in the mean where values are in tiers. With LSE also log2 of the mass, into ``lse``.
    A program takes ``each`` rows in turn, those of a head behind each other.
    """
    column = tl.program_id(0) % PARTS
    start = tl.program_id(0) // PARTS * each
    d = column * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.arange(0, SLOTS)
    live = slot < splits + EXACTS
    for i in tl.range(start, tl.minimum(start + each, batch * (H * ROWS))):
        h = i // (batch * ROWS)
        b, r = (i // ROWS % batch).to(tl.int64), i % ROWS
        group = b * G + h // (H // G)
        row = h % (H // G) * ROWS + r
        base = group * (splits + EXACTS)
        at = stats + base * (STATS * STRIDE) + row
        in_slots = at + slot * (STATS * STRIDE)
        place = (b * H + h) * ROWS + r
        inside = d < DV
        sums = part + (base * STRIDE + row) * VW
        slots = splits
        if POOL and not VX:
            slots += 1  # programs over pools leave sums of codes

        # What is read is asked for before warps first wait for each other.
        m = tl.load(in_slots, mask=live, other=-float("inf"))  # [SLOTS]
        masses = tl.load(in_slots + STRIDE, mask=live, other=0.0)
        coded_masses = tl.load(in_slots + 2 * STRIDE, mask=live, other=0.0)
        gains = tl.load(in_slots + 3 * STRIDE, mask=live, other=0.0)
        exacts = exact + place * (EXACTS * DV) + d
        total = tl.load(exacts + (EXACTS - 1) * DV, mask=inside, other=0.0)  # [COLUMNS]
        if EXACTS == 2:
            pooled = tl.load(exacts, mask=inside, other=0.0)
        if VX:
            number, held = d, inside
        else:
            n: tl.constexpr = H // VG * DV
            own = h % (H // VG) * DV
            gv = (h // (H // VG)).to(tl.int64)
            mu = tl.load(mean + gv * n + own + d, mask=inside, other=0.0)
            number = tl.arange(0, CHUNK)
            held = number < VW
            basis, unit = _basis(
                synthesis, units, gv, own, number, d, held, inside, n, VG, VW, V8, V4, V2
            )
        first_m, first_x = _slots(sums, at, 0, slots, number, held, STRIDE, STATS, VW, TILE)

        top = tl.max(m, 0)
        if SINKS:
            sink = tl.load(sinks + h * (ROWS // Q) + r // Q).to(tl.float32) * 1.4426950408889634
            top = tl.maximum(top, sink)
        base_m = tl.where(top == -float("inf"), 0.0, top)
        f = tl.exp2(m - base_m)
        f_pool = tl.where(slot == splits, f, 0.0)
        f_ring = tl.where(slot == splits + EXACTS - 1, f, 0.0)
        mass, coded_mass, gained, f_pool, f_ring = tl.reduce(
            (f * masses, f * coded_masses, f * gains, f_pool, f_ring), 0, _five_sums
        )
        lack8, lack4, lack2 = 0.0, 0.0, 0.0
        if STATS > 4:
            lack8 = tl.sum(f * tl.load(in_slots + 4 * STRIDE, mask=live, other=0.0), 0)
            lack4 = tl.sum(f * tl.load(in_slots + 5 * STRIDE, mask=live, other=0.0), 0)
            lack2 = tl.sum(f * tl.load(in_slots + 6 * STRIDE, mask=live, other=0.0), 0)
        if SINKS:
            mass += tl.exp2(sink - base_m)
        total *= f_ring
        if EXACTS == 2:
            total += f_pool * pooled
        x = _added(first_m, first_x, sums, at, slots, base_m, number, held, STRIDE, STATS, VW, TILE)
        if VX:
            total += x
        else:
            total += coded_mass * mu
            total += _expanded(x, gained, lack8, lack4, lack2, number, basis, unit, V8, V4)
            for first in tl.static_range(CHUNK, VW, CHUNK):
                number = first + tl.arange(0, CHUNK)
                held = number < VW
                basis, unit = _basis(
                    synthesis, units, gv, own, number, d, held, inside, n, VG, VW, V8, V4, V2
                )
                m, x = _slots(sums, at, 0, slots, number, held, STRIDE, STATS, VW, TILE)
                x = _added(m, x, sums, at, slots, base_m, number, held, STRIDE, STATS, VW, TILE)
                total += _expanded(x, gained, lack8, lack4, lack2, number, basis, unit, V8, V4)
        total = total / tl.where(mass == 0.0, 1.0, mass)
        if LSE:
            tl.store(lse + place, tl.log2(mass) + base_m, mask=column == 0)
        tl.store(out + place * DV + d, total.to(out.dtype.element_ty), mask=inside)
