"""Which tokens the pool takes of those that have been coded, and what the codes are charged with.

The rules are those of ``kernels/pool.py``; the sums are those of ``kernels.encode.tally``. One
program a sequence: tokens that a pool wants are few, so looking for the worst one again and again
costs a pass each, and most often there is none after the first.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _demand(
    judged, seen, pos, b, n, tokens, start, batch, G: tl.constexpr, SEEN: tl.constexpr
):  # fmt: skip
    """Of some tokens: demand for a slot, error, size, and whether they are broken or held."""
    live = n < tokens
    told = judged + (b * G).to(tl.int64) * tokens + n
    plane = (batch * G).to(tl.int64) * tokens
    size = tl.load(told, mask=live, other=0.0)
    stored = tl.load(told + plane, mask=live, other=0.0)
    wrong = tl.load(told + 2 * plane, mask=live, other=0.0)
    bad = tl.load(told + 3 * plane, mask=live, other=0.0)
    for g in tl.static_range(1, G):
        size += tl.load(told + g * tokens, mask=live, other=0.0)
        stored += tl.load(told + plane + g * tokens, mask=live, other=0.0)
        wrong += tl.load(told + 2 * plane + g * tokens, mask=live, other=0.0)
        bad += tl.load(told + 3 * plane + g * tokens, mask=live, other=0.0)
    error = tl.maximum(size - stored, 0.0) + wrong
    if SEEN:
        live = live & (tl.load(seen + b.to(tl.int64) * tokens + n, mask=live, other=0) != 0)
    held = tl.sum((pos[:, None] == (start + n)[None, :]).to(tl.int32), 0) > 0
    broken = live & (bad > 0.0)
    # An error that is too large for a number (or none) comes right behind tokens that are broken.
    demand = tl.where(broken, float("inf"), tl.where(error < 3e38, error, 3e38))
    return tl.where(live & (held == 0), demand, 0.0), error, size, live, broken, held


@triton.jit(do_not_specialize=["tokens", "counted", "batch"])
def settle_kernel(
    judged, x, seen, pool, positions, tallies, x_b, x_h, x_t, begin, tokens, counted, batch,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, SINKS: tl.constexpr, NEW: tl.constexpr,
    SEEN: tl.constexpr, SPARE: tl.constexpr, STRAINED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Fills ``pool [B, H, E, D]`` and ``positions [B, E]``; ``tallies [B, 3]``.

    Tokens ``start .. start + tokens``, ``x [B, H, T, D]``; ``start`` is read from ``begin``. The
    first ``counted`` of them count in the sums.
    NEW: pool and positions are made here; SINKS slots are the first that are seen.
    """
    b = tl.program_id(0)
    start = tl.load(begin).to(tl.int32)
    slot = tl.arange(0, EP)
    if NEW:
        first = tokens * 0
        if SEEN:
            first = first + tokens
            for at in tl.range(0, tokens, N):
                n = at + tl.arange(0, N)
                some = tl.load(seen + b.to(tl.int64) * tokens + n, mask=n < tokens, other=0) != 0
                first = tl.minimum(first, tl.min(tl.where(some, n, tokens), 0))
            first = tl.where(first == tokens, 0, first)
        pos = tl.where(slot < SINKS, first + slot, -1)
    else:
        pos = tl.load(positions + b * E + slot, mask=slot < E, other=-1).to(tl.int32)
    given = pos
    free = (pos < 0) & (slot < E)
    turn = tl.where(free, tl.cumsum(free.to(tl.int32), 0), -1)
    room = tl.sum(free.to(tl.int32), 0)

    rank = room * 0 + 1
    while rank <= room:
        most = tl.sum(tl.full([1], 0.0, tl.float32), 0)
        which = room * 0
        for at in tl.range(0, tokens, N):
            n = at + tl.arange(0, N)
            demand, _e, _s, _l, _b, _h = _demand(
                judged, seen, pos, b, n, tokens, start, batch, G, SEEN
            )
            best = tl.max(demand, 0)
            if best > most:
                which = at + tl.argmax(demand, 0)
                most = best
        wanted = (most == float("inf")) | ((most > STRAINED) & (rank <= room - SPARE))
        if wanted:
            pos = tl.where(turn == rank, start + which, pos)
            rank += 1
        else:  # nor is any other
            rank = room + 1

    spoilt = room * 0
    error = tl.full([N], 0.0, tl.float32)
    size = tl.full([N], 0.0, tl.float32)
    count = tl.full([N], 0.0, tl.float32)
    for at in tl.range(0, tokens, N):
        n = at + tl.arange(0, N)
        _d, wrong, whole, live, broken, held = _demand(
            judged, seen, pos, b, n, tokens, start, batch, G, SEEN
        )
        before = tl.sum((given[:, None] == (start + n)[None, :]).to(tl.int32), 0) > 0
        spoilt += tl.sum((broken & (before == 0)).to(tl.int32), 0)
        counts = live & (held == 0) & (n < counted)
        error += tl.where(counts, wrong, 0.0)
        size += tl.where(counts, whole, 0.0)
        count += counts.to(tl.float32)
    tl.store(tallies + b * 3, tl.sum(error, 0))
    tl.store(tallies + b * 3 + 1, tl.sum(size, 0))
    tl.store(tallies + b * 3 + 2, tl.sum(count, 0))

    tl.store(positions + b * E + slot, pos.to(tl.int64), mask=slot < E)
    h, d = tl.arange(0, HP), tl.arange(0, DP)
    inside = (h < H)[:, None] & (d < D)[None, :]
    spoil = room * 0 - 1  # the slot that becomes NaN
    if spoilt > room:
        spoil = room * 0
        last = room * 0 - 1
        for i in tl.static_range(0, E):
            place = tl.sum(tl.where(slot == i, pos, 0), 0)
            token = place - start
            hit = (token >= 0) & (token < tokens)
            token = tl.where(hit, token, 0)
            where = x + b.to(tl.int64) * x_b + h[:, None].to(tl.int64) * x_h + d[None, :]
            value = tl.load(where + token.to(tl.int64) * x_t, mask=inside & hit, other=0.0)
            value = value.to(tl.float32)
            if not NEW:
                cell = pool + ((b * H + h[:, None]).to(tl.int64) * E + i) * D + d[None, :]
                there = tl.load(cell, mask=inside & (hit == 0), other=0.0).to(tl.float32)
                value = tl.where(hit, value, there)
            bad = tl.sum(tl.sum((value - value != 0.0).to(tl.int32), 1), 0) > 0
            later = bad & (place > last)
            spoil = tl.where(later, i, spoil)
            last = tl.where(later, place, last)
    for i in tl.static_range(0, E):
        token = tl.sum(tl.where(slot == i, pos, 0), 0) - start
        hit = (token >= 0) & (token < tokens)
        token = tl.where(hit, token, 0)
        where = x + b.to(tl.int64) * x_b + h[:, None].to(tl.int64) * x_h + d[None, :]
        value = tl.load(where + token.to(tl.int64) * x_t, mask=inside & hit, other=0.0)
        cell = pool + ((b * H + h[:, None]).to(tl.int64) * E + i) * D + d[None, :]
        wanted = hit
        if NEW:
            wanted = hit | (i >= 0)
        value = tl.where(spoil == i, float("nan"), value.to(tl.float32))
        wanted = wanted | (spoil == i)
        tl.store(cell, value.to(pool.dtype.element_ty), mask=inside & wanted)
