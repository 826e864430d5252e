"""What the kernels read of a side: plain codes, each with rows for some of the tokens.

The kernel over tokens knows plain codes alone (``kernels/triton/coded.py``). A layout is one part,
or one for each kind of tokens; dropped tokens have no row in it, and bits in tiers are put together
before. As expressions of the coded tokens C, of which prefill coded F:

    rows  =  (1 - evicted) F + (C - F)      of a kind: its tokens instead of F; what comes later
                                            is text

Triton is not needed to know this, so nothing here imports a kernel; a test holds it to what the
launches do.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ..codec import Layout
from ..codec.kinds import TEXT, VISUAL
from ..codec.layout import PARTS
from .sizes import PackedSide
from .symbols import CODED, FIRST, Expr


@dataclass(frozen=True)
class Part:
    """The tokens of a side that have the same code.

    Attributes:
        layout: plain.
        rows: of each sequence.
        token: bytes of a row, as it is attended.
        planes: of bits in tiers, which are put together before; 0: none.
        spread: bytes of a row that this reads and writes.
    """

    layout: Layout
    rows: Expr
    token: Expr
    planes: int
    spread: Expr


def parts_of(side: PackedSide) -> tuple[Part, ...]:
    """The parts of a side, in the order in which they are attended."""
    layout = side.layout
    prompts: tuple[Expr, ...] = (FIRST, 0)
    if layout.plane_kinds and side.kinds is not None:
        prompts = side.kinds[TEXT], side.kinds[VISUAL]
    laters = CODED - FIRST, 0
    found = []
    for code, prompt, later in zip(layout.by_kind, prompts, laters, strict=False):
        stays = sympy.Rational(PARTS - code.evicts, PARTS)
        whole, planes, lacks = code.plain, len(code.tier_shares), int(bool(code.tier_shares))
        token = sympy.Rational(whole.token_bytes(side.dtype)) + lacks
        written = whole.payload_fields(side.dtype)[0][0] + 1  # codes; how many bits they lack
        spread = lacks * (written + _tier_bytes(side, code))
        found.append(Part(whole, stays * prompt + later, token, planes, spread))
    return tuple(found)


def _tier_bytes(side: PackedSide, code: Layout) -> Expr:
    """Of a row with bits in tiers: its leading bits, and the planes that it has in the mean."""
    inner: Layout = getattr(code, "inner", code)  # that of the tokens that stay
    widths = [width for width, _ in inner.payload_fields(side.dtype)]
    planes = zip(widths[inner.tokenwise :], inner.shares, strict=True)
    return widths[0] + sum(sympy.Rational(width * share, PARTS) for width, share in planes)
