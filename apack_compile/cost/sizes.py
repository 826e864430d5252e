"""Bytes of one packed side, as expressions of batch B, prompt S and later tokens T.

A side is its payload, pool, positions, ring, for some codes a basis of each sequence, and with
tiers the importance of the tokens in the ring (``cache/store.py``). Exact right behind prefill.
Later the payload grows by a little more than is needed at a time, and the expressions are the mean
over what it may be just then:

    coded(S, T)    =  c + block max(0, ceil((S + T - c - ring) / block)),  c = max(S - window, 0)
    rows(first, n) =  first while n <= first, then n in whole chunks + n / (2 SLACK)

``first`` are the rows that prefill makes, in whole chunks: S of a payload tensor with a row for
every token, its share of c of a plane. Planes grow with those tensors, by their share of the tokens
that these have room for; so does the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import sympy
import torch

from ..cache.policy import Policy
from ..cache.store import SLACK
from ..codec import CodeRef, Layout
from ..codec.layout import PARTS
from ..kernels.planes import quotas, rows_of
from .symbols import BATCH, LATER, PROMPT, Expr, value_of


@dataclass(frozen=True)
class PackedSide:
    """What the bytes of one side depend on, besides batch and length.

    Attributes:
        layout: of its code.
        policy: which tokens stay exact.
        dtype: of the dense cache.
        own: bytes of the code's parameters that belong to the cache: of each sequence, and once.
        kinds: of each kind, the coded tokens of the prompt in the sequence that has the most, where
            kinds have codes of their own; None: all are text.
    """

    layout: Layout
    policy: Policy
    dtype: torch.dtype
    own: tuple[int, int] = (0, 0)
    kinds: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls, ref: CodeRef, policy: Policy, dtype: torch.dtype, kinds: tuple[int, ...] | None = None
    ) -> PackedSide:
        """The side that a code makes of a dense cache of ``dtype``."""
        own = (0, 0)
        if ref.layout.per_sequence:
            first = ref.code.params[0]
            each = first[0].numel() * first.dtype.itemsize
            own = each, ref.cache_bytes - each * first.shape[0]
        known = kinds if ref.layout.plane_kinds else None
        return cls(ref.layout, policy.for_code(ref), dtype, own, known)


@dataclass(frozen=True)
class SideBytes:
    """Expressions of B, S and T; together they are ``SideStore.nbytes``.

    Attributes:
        codes, gains, exact_tokens, window: as of :class:`~apack_compile.CacheBytes`.
    """

    codes: Expr
    gains: Expr
    exact_tokens: Expr
    window: Expr

    @property
    def total(self) -> Expr:
        """All bytes of the side."""
        return self.codes + self.gains + self.exact_tokens + self.window


def coded_tokens(policy: Policy, later: Expr = LATER) -> Expr:
    """Tokens that have left the ring."""
    first = sympy.Max(PROMPT - policy.window, 0)
    beyond = PROMPT + later - first - policy.ring
    return first + policy.block * sympy.Max(sympy.ceiling(beyond / policy.block), 0)


def _in_chunks(rows: Expr, chunk: int, least: int) -> Expr:
    return chunk * sympy.Max(sympy.ceiling(rows / sympy.Integer(chunk)), least)


def _held(first: Expr, wanted: Expr, chunk: int) -> tuple[Expr, Expr]:
    """Rows of a payload tensor that was made with ``first`` and has to hold ``wanted``; slack."""
    slack = wanted / sympy.Integer(2 * SLACK)
    made, grown = wanted <= first, _in_chunks(wanted, chunk, 1)
    return sympy.Piecewise((first, made), (grown, True)), sympy.Piecewise((0, made), (slack, True))


def _made(side: PackedSide, coded: Expr, rows: Sequence[Expr]) -> list[Expr]:
    """Rows that prefill makes of each plane, of which ``rows`` are in use."""
    layout, chunk = side.layout, side.policy.chunk
    if not layout.plane_kinds:
        return [_in_chunks(n, chunk, 1) for n in rows]
    whole = [_in_chunks(n, chunk, 1) for n in side.kinds or (coded, 0)]
    each = zip(layout.shares, layout.plane_kinds, strict=True)
    return [_in_chunks(rows_of(share, whole[kind]), chunk, 1) for share, kind in each]


@cache
def side_bytes(side: PackedSide) -> SideBytes:
    """Bytes of a packed side."""
    layout, policy, size = side.layout, side.policy, side.dtype.itemsize
    first, coded = coded_tokens(policy, sympy.Integer(0)), coded_tokens(policy)
    flushes = (coded - first) / policy.block
    room, slack = _held(_in_chunks(PROMPT, policy.chunk, 0), coded, policy.chunk)
    rows = room + slack
    widths = [width * kind.itemsize for width, kind in layout.payload_fields(side.dtype)]
    codes, *rest = widths[: layout.tokenwise]
    planes = sympy.Integer(0)
    prompts = quotas(layout, first, kinds=side.kinds)
    blocks = quotas(layout, policy.block, later=True)
    rooms = _made(side, first, prompts)
    for width, prompt, block, made, share in zip(
        widths[layout.tokenwise :], prompts, blocks, rooms, layout.later_shares, strict=True
    ):
        part = sympy.Rational(share, PARTS)
        grown = _in_chunks(prompt + part * (room - first), policy.chunk, 1) + part * slack
        is_first = prompt + flushes * block <= made
        planes += width * sympy.Piecewise((made, is_first), (grown, True))
    slots, more = (policy.sinks + layout.slots(policy.extra, n) for n in (first, rows))
    slots = sympy.Piecewise((slots, sympy.Eq(flushes, 0)), (more, True))
    token = layout.heads * layout.dim * size
    slot = token + layout.tracks_importance * torch.float32.itemsize
    each, once = side.own
    return SideBytes(
        BATCH * (codes * rows + planes + each) + once,
        BATCH * sum(rest) * rows,
        BATCH * slots * (token + torch.int64.itemsize),
        BATCH * policy.ring * slot,
    )


@lru_cache(maxsize=1024)
def bytes_of(side: PackedSide, batch: int, prompt: int, later: int = 0) -> tuple[float, ...]:
    """The bytes of :class:`SideBytes`, in order, in numbers.

    Args:
        side: what is packed.
        batch: sequences.
        prompt: tokens that prefill packs.
        later: tokens that come after them.
    """
    found = side_bytes(side)
    values = {BATCH: batch, PROMPT: prompt, LATER: later}
    every = (found.codes, found.gains, found.exact_tokens, found.window)
    return tuple(value_of(expr, values) for expr in every)
