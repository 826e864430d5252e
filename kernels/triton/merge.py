"""Splits of one step put together, and values out of the space of their codes.

Two launches: ``sum_kernel`` adds up what the splits left, with all splits of a row in flight at
once; ``expand_kernel`` is one small matrix product a head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import OFFSET, OFFSET_8, component


@triton.jit
def sum_kernel(
    part, stats, sums, masses, splits, sinks,
    G: tl.constexpr, HEADS: tl.constexpr, Q: tl.constexpr,
    STRIDE: tl.constexpr, VX: tl.constexpr, VW: tl.constexpr,
    POOLED: tl.constexpr, SINKS: tl.constexpr, SLOTS: tl.constexpr, CELLS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Weighted sums ``[B, G, VW, STRIDE]`` over all splits, and ``masses [B, G, 4, STRIDE]``.

    Relative to the largest score m of the row: the mass of all tokens, that of tokens whose values
    are coded, that of them with gains, and the factor 2^(m_exact - m) of what ring and pool left.
    With SINKS the score of its head's sink is one of the row's, and its mass one of all.
    """
    chunk = tl.program_id(0) % CHUNKS
    group = (tl.program_id(0) // CHUNKS).to(tl.int64)
    cell = chunk * CELLS + tl.arange(0, CELLS)  # component and row
    slot = tl.arange(0, SLOTS)
    live = slot <= splits
    base = group * (splits + 1)
    at = stats + (base + slot)[:, None] * (4 * STRIDE) + (cell % STRIDE)[None, :]
    m = tl.load(at, mask=live[:, None], other=-float("inf"))  # [SLOTS, CELLS]
    top = tl.max(m, 0)
    if SINKS:
        head = group % G * HEADS + cell % STRIDE // Q
        some = cell % STRIDE < HEADS * Q
        sink = tl.load(sinks + head, mask=some, other=-float("inf")).to(tl.float32)
        sink = sink * 1.4426950408889634
        top = tl.maximum(top, sink)
    base_m = tl.where(top == -float("inf"), 0.0, top)
    f = tl.exp2(m - base_m[None, :])
    if chunk * CELLS < STRIDE:
        first = cell < STRIDE
        out = masses + group * (4 * STRIDE) + cell
        for i in tl.static_range(1, 4):
            mass = tl.load(at + i * STRIDE, mask=live[:, None], other=0.0)
            where = out + (i - 1) * STRIDE
            whole = tl.sum(f * mass, 0)
            if SINKS:  # noqa: SIM102  (known when the kernel is compiled)
                if i == 1:
                    whole += tl.exp2(sink - base_m)
            tl.store(where, whole, mask=first)
        exact = tl.sum(tl.where((slot == splits)[:, None], f, 0.0), 0)
        tl.store(out + 3 * STRIDE, exact, mask=first)
    if VX or not POOLED:
        live = slot < splits  # programs over ring and pool leave no sums of codes
    held = cell < VW * STRIDE
    x = tl.load(
        part + (base + slot)[:, None] * (VW * STRIDE) + cell[None, :],
        mask=live[:, None] & held[None, :], other=0.0,
    )  # [SLOTS, CELLS]  # fmt: skip
    total = tl.sum(tl.where(live[:, None], f, 0.0) * x, 0)
    tl.store(sums + group * (VW * STRIDE) + cell, total, mask=held)


@triton.jit
def expand_kernel(
    sums, masses, exact, mean, synthesis, units, out, batch,
    H: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, STRIDE: tl.constexpr, VG: tl.constexpr,
    VX: tl.constexpr, DV: tl.constexpr, VW: tl.constexpr,
    V8: tl.constexpr, V4: tl.constexpr, V2: tl.constexpr,
    CHUNK: tl.constexpr, X: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``out [B, H, ROWS, DV]``: some columns of X rows of one head, of any sequences.

    out = (f exact + (sums - offset gained) synthesis + mass of coded values * mean) / mass
    """
    part = tl.program_id(0) % PARTS
    h = tl.program_id(0) // PARTS % H
    i = tl.program_id(0) // (PARTS * H) * X + tl.arange(0, X)
    some = i < batch * ROWS
    b, r = (i // ROWS).to(tl.int64), i % ROWS
    group = b * G + h // (H // G)
    row = h % (H // G) * ROWS + r
    at = masses + group * (4 * STRIDE) + row
    mass = tl.load(at, mask=some, other=1.0)
    coded_mass = tl.load(at + STRIDE, mask=some, other=0.0)
    gained = tl.load(at + 2 * STRIDE, mask=some, other=0.0)
    factor = tl.load(at + 3 * STRIDE, mask=some, other=0.0)
    d = part * COLUMNS + tl.arange(0, COLUMNS)
    inside = some[:, None] & (d < DV)[None, :]
    where = ((b * H + h) * ROWS + r)[:, None] * DV + d[None, :]
    acc = tl.load(exact + where, mask=inside, other=0.0) * factor[:, None]
    cells = sums + group * (VW * STRIDE) + row
    if VX:
        acc += tl.load(cells[:, None] + d[None, :] * STRIDE, mask=inside, other=0.0)
    else:
        n: tl.constexpr = H // VG * DV
        own = h % (H // VG) * DV
        first = synthesis + (h // (H // VG)).to(tl.int64) * VW * n + own
        for start in tl.range(0, VW, CHUNK, num_stages=3):
            number = start + tl.arange(0, CHUNK)
            held = number < VW
            w = component(number, V8, V4, V2)
            basis = tl.load(
                first + w[:, None] * n + d[None, :],
                mask=held[:, None] & (d < DV)[None, :], other=0.0,
            ).to(tl.float32)  # [CHUNK, COLUMNS]  # fmt: skip
            unit = tl.load(units + (VG + h // (H // VG)) * VW + w, mask=held, other=0.0)
            x = tl.load(
                cells[:, None] + number[None, :] * STRIDE,
                mask=some[:, None] & held[None, :], other=0.0,
            )  # [X, CHUNK]  # fmt: skip
            too_much = tl.where(number < V8, OFFSET_8, OFFSET)
            x = (x - gained[:, None] * too_much[None, :]) * unit[None, :]
            acc = tl.dot(x, basis, acc, input_precision="tf32x3")
        mu = tl.load(mean + h // (H // VG) * n + own + d, mask=d < DV, other=0.0)
        acc += coded_mass[:, None] * mu[None, :]
    acc = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=inside)
