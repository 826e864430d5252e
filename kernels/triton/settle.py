"""Which tokens the pool takes of those that have been coded, and what the codes are charged with.

The rules are those of ``kernels/pool.py``; the sums are those of ``kernels.encode.tally``. Tokens
come in chunks: of each one its worst token and its sums are kept, by a program of their own where
there are many. One program a sequence then takes the worst of the worst, again and again, and looks
anew at the chunk it came from: tokens that a pool wants are few, and most often there is none.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = 7
"""Numbers that are kept of a chunk."""


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


@triton.jit
def _scan(
    judged, seen, pos, b, chunk, tokens, counted, start, batch,
    G: tl.constexpr, SEEN: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Of a chunk: the worst demand, whose it is, sums (error, size, count), broken, first seen."""
    i = tl.arange(0, N)
    n = chunk * N + i
    demand, error, size, live, broken, held = _demand(
        judged, seen, pos, b, n, tokens, start, batch, G, SEEN
    )
    counts = live & (held == 0) & (n < counted)
    return (
        tl.max(demand, 0), tl.argmax(demand, 0),
        tl.sum(tl.where(counts, error, 0.0), 0), tl.sum(tl.where(counts, size, 0.0), 0),
        tl.sum(counts.to(tl.int32), 0), tl.sum(broken.to(tl.int32), 0),
        tl.min(tl.where(live, i, N), 0),
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "counted", "batch", "chunks"])
def survey_kernel(
    judged, seen, told, tokens, counted, batch, chunks,
    G: tl.constexpr, SEEN: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One chunk of one sequence, to ``told [7, B, chunks]`` (float32), as if no pool had any."""
    chunk, b = tl.program_id(0), tl.program_id(1)
    nothing = tl.full([1], -1, tl.int32)
    worst, which, error, size, count, broken, first = _scan(
        judged, seen, nothing, b, chunk, tokens, counted, 0, batch, G, SEEN, N
    )
    field = batch * chunks
    to = told + b * chunks + chunk
    tl.store(to, worst)
    tl.store(to + field, which.to(tl.float32))
    tl.store(to + 2 * field, error)
    tl.store(to + 3 * field, size)
    tl.store(to + 4 * field, count.to(tl.float32))
    tl.store(to + 5 * field, broken.to(tl.float32))
    tl.store(to + 6 * field, first.to(tl.float32))


@triton.jit(do_not_specialize=["tokens", "counted", "batch", "chunks"])
def settle_kernel(
    judged, x, seen, told, pool, positions, tallies, x_b, x_h, x_t, begin, tokens, counted, batch,
    chunks, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, SINKS: tl.constexpr, NEW: tl.constexpr,
    SEEN: tl.constexpr, SPARE: tl.constexpr, STRAINED: tl.constexpr,
    N: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """Fills ``pool [B, H, E, D]`` and ``positions [B, E]``; ``tallies [B, 3]``.

    Tokens ``start .. start + tokens``, ``x [B, H, T, D]``; ``start`` is read from ``begin``. The
    first ``counted`` of them count in the sums.
    NEW: pool and positions are made here; SINKS slots are the first that are seen.
    N: tokens of a chunk; CP: chunks, padded. If that is 1, ``told`` is not read.
    """
    b = tl.program_id(0)
    start = tl.load(begin).to(tl.int32)
    slot = tl.arange(0, EP)
    c = tl.arange(0, CP)
    field = batch * chunks
    row = told + b * chunks + c
    exists = c < chunks
    if NEW:
        first = tokens * 0
        if SEEN:
            if CP == 1:
                n = tl.arange(0, N)
                some = tl.load(seen + b.to(tl.int64) * tokens + n, mask=n < tokens, other=0) != 0
                first = tl.min(tl.where(some, n, tokens), 0)
            else:
                begins = tl.load(row + 6 * field, mask=exists, other=N).to(tl.int32)
                first = tl.min(tl.where(begins < N, c * N + begins, tokens), 0)
            first = tl.where(first == tokens, 0, first)
        pos = tl.where(slot < SINKS, first + slot, -1)
    else:
        pos = tl.load(positions + b * E + slot, mask=slot < E, other=-1).to(tl.int32)
    given = pos
    free = (pos < 0) & (slot < E)
    turn = tl.where(free, tl.cumsum(free.to(tl.int32), 0), -1)
    room = tl.sum(free.to(tl.int32), 0)

    if CP == 1:
        w, a, e, s, k, broken, _f = _scan(
            judged, seen, pos, b, 0, tokens, counted, start, batch, G, SEEN, N
        )
        worst = tl.full([CP], 0.0, tl.float32) + w
        which = tl.full([CP], 0, tl.int32) + a
        error = tl.full([CP], 0.0, tl.float32) + e
        size = tl.full([CP], 0.0, tl.float32) + s
        count = tl.full([CP], 0, tl.int32) + k
    else:
        worst = tl.load(row, mask=exists, other=0.0)
        which = tl.load(row + field, mask=exists, other=0.0).to(tl.int32)
        error = tl.load(row + 2 * field, mask=exists, other=0.0)
        size = tl.load(row + 3 * field, mask=exists, other=0.0)
        count = tl.load(row + 4 * field, mask=exists, other=0.0).to(tl.int32)
        broken = tl.sum(tl.load(row + 5 * field, mask=exists, other=0.0), 0).to(tl.int32)
        before = room * 0 - 1
        for j in tl.range(0, E):  # chunks with tokens that have a slot already
            token = tl.sum(tl.where(slot == j, pos, 0), 0) - start
            chunk = tl.where((token >= 0) & (token < tokens), token // N, before)
            if chunk != before:
                w, a, e, s, k, _b, _f = _scan(
                    judged, seen, pos, b, chunk, tokens, counted, start, batch, G, SEEN, N
                )
                worst, which = tl.where(c == chunk, w, worst), tl.where(c == chunk, a, which)
                error, size = tl.where(c == chunk, e, error), tl.where(c == chunk, s, size)
                count = tl.where(c == chunk, k, count)
                before = chunk

    rank = room * 0 + 1
    while rank <= room:
        most = tl.max(worst, 0)
        wanted = (most == float("inf")) | ((most > STRAINED) & (rank <= room - SPARE))
        if wanted:
            chunk = tl.argmax(worst, 0)
            token = chunk * N + tl.sum(tl.where(c == chunk, which, 0), 0)
            pos = tl.where(turn == rank, start + token, pos)
            rank += 1
            w, a, e, s, k, _b, _f = _scan(
                judged, seen, pos, b, chunk, tokens, counted, start, batch, G, SEEN, N
            )
            worst, which = tl.where(c == chunk, w, worst), tl.where(c == chunk, a, which)
            error, size = tl.where(c == chunk, e, error), tl.where(c == chunk, s, size)
            count = tl.where(c == chunk, k, count)
        else:  # nor is any other
            rank = room + 1

    known = given - start  # [EP], tokens that had a slot before: no demand, broken or not
    among = (given >= 0) & (known >= 0) & (known < tokens)
    if SEEN:
        told_of = seen + b.to(tl.int64) * tokens + known
        among = among & (tl.load(told_of, mask=among, other=0) != 0)
    faults = tl.full([EP], 0.0, tl.float32)
    for g in tl.static_range(0, G):
        of = judged + ((3 * batch + b) * G + g).to(tl.int64) * tokens + known
        faults += tl.load(of, mask=among, other=0.0)
    spoilt = broken - tl.sum((faults > 0.0).to(tl.int32), 0)
    tl.store(tallies + b * 3, tl.sum(error, 0))
    tl.store(tallies + b * 3 + 1, tl.sum(size, 0))
    tl.store(tallies + b * 3 + 2, tl.sum(count, 0).to(tl.float32))

    tl.store(positions + b * E + slot, pos.to(tl.int64), mask=slot < E)
    token = pos - start
    hit = (token >= 0) & (token < tokens) & (slot < E)
    d = tl.arange(0, DP)
    inside = (d < D)[None, :]
    source = x + b.to(tl.int64) * x_b + token[:, None].to(tl.int64) * x_t + d[None, :]
    cells = pool + (b.to(tl.int64) * H * E + slot[:, None]) * D + d[None, :]
    spoil = room * 0 - 1  # the slot that becomes NaN
    if spoilt > room:
        strays = tl.full([EP], 0, tl.int32)
        for h in tl.range(0, H):
            value = tl.load(source + h * x_h, mask=hit[:, None] & inside, other=0.0)
            value = value.to(tl.float32)
            if not NEW:
                kept = (hit == 0) & (slot < E)
                value += tl.load(cells + h * E * D, mask=kept[:, None] & inside, other=0.0)
            strays += tl.sum((value - value != 0.0).to(tl.int32), 1)
        spoil = tl.argmax(tl.where(strays > 0, pos, -1), 0)
    spoils = slot == spoil
    wanted = hit | spoils
    if NEW:
        wanted = slot < E
    for h in tl.range(0, H):
        value = tl.load(source + h * x_h, mask=hit[:, None] & inside, other=0.0)
        value = tl.where(spoils[:, None], float("nan"), value.to(tl.float32))
        value = value.to(pool.dtype.element_ty)
        tl.store(cells + h * E * D, value, mask=wanted[:, None] & inside)
