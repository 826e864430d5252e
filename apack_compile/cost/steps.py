"""Time of packed attention in one decode step, as an expression of batch B and coded tokens C.

Each of the three launches takes ``launch + max(bytes / bandwidth, work)`` (roofline):

    launch   bytes                                                    work
    fold     basis of the keys                                        none
    attend   codes of C tokens; ring and pool; what splits leave      conversions
    merge    what splits left; basis of the values                    none

Sizes and splits are those of ``kernels/triton/plan.py`` and ``launch.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import sympy

from ..kernels.triton.plan import (
    MOST_SPLITS,
    Config,
    Plan,
    default_config,
    make_plan,
    supported,
)
from .device import Device
from .sizes import PackedSide
from .symbols import BATCH, CODED, Expr, value_of

FLOAT = 4
"""Bytes of a number that splits leave."""

STATS = 4
"""Numbers that a split leaves of each row besides the weighted sums."""

HALF = 2
"""Bytes of an exact number, as the kernels attend in 16 bits, and of one of the bases."""


@dataclass(frozen=True)
class Launch:
    """One kernel of a step.

    Attributes:
        name: ``fold``, ``attend`` or ``merge``.
        moved: bytes.
        work: seconds of what is not the moving of bytes.
    """

    name: str
    moved: Expr
    work: Expr

    def seconds(self, device: Device) -> Expr:
        """What it takes."""
        return device.launch + sympy.Max(self.moved / device.bandwidth, self.work)


def is_predicted(k: PackedSide, v: PackedSide) -> bool:
    """Whether the model knows the kernels of these codes: fitted ones in 16 bits.

    It knows nothing of keys that are rebuilt and turned, nor of the launches that rows of their own
    take (planes, shares of exact tokens).
    """
    layouts = k.layout, v.layout
    plain = not any(x.positional or x.shares or x.kept for x in layouts)
    return plain and all(
        supported(side.layout) and side.layout.param_count > 0 and side.dtype.itemsize == HALF
        for side in (k, v)
    )


def splits_of(plan: Plan, config: Config, device: Device) -> Expr:
    """``launch.count_splits`` as an expression."""
    slots = device.multiprocessors * config.fill
    rest = sympy.Max(slots - BATCH * plan.exact_programs, int(slots * config.share))
    room = sympy.floor(rest / (BATCH * plan.groups * plan.blocks))
    tiles = sympy.ceiling(CODED / sympy.Integer(config.tokens))
    return sympy.Max(sympy.Min(room, tiles, MOST_SPLITS), 1)


@cache
def launches(
    k: PackedSide, v: PackedSide, q_heads: int, queries: int, device: Device
) -> tuple[Launch, ...]:
    """The kernels of one layer, in order.

    Args:
        k, v: its sides.
        q_heads, queries: of the step.
        device: where it runs.
    """
    specs = k.layout.spec, v.layout.spec
    config = default_config(*specs, q_heads * queries)
    pools = [side.policy.sinks + side.layout.slots(side.policy.extra, 0) for side in (k, v)]
    plan = make_plan(*specs, q_heads, queries, (pools[0], pools[1]), k.policy.ring, config)
    heads, groups = plan.attend["H"], plan.groups
    k_width, v_width = plan.attend["KW"], plan.attend["VW"]
    splits = splits_of(plan, config, device)
    left = BATCH * q_heads * queries * (splits + plan.exacts) * (v_width + STATS) * FLOAT
    exact = sum(
        (slots + side.policy.ring) * side.layout.dim
        for slots, side in zip(pools, (k, v), strict=True)
    )
    codes = sum(sympy.Rational(side.layout.token_bytes(side.dtype)) for side in (k, v))
    read = BATCH * (CODED * codes + heads * exact * HALF)
    numbers = BATCH * groups * plan.blocks * CODED * (k_width + v_width)
    bases = [w * heads * s.layout.dim * HALF for w, s in ((k_width, k), (v_width, v))]
    return (
        Launch("fold", bases[0], 0),
        Launch("attend", read + left, numbers / device.conversions),
        Launch("merge", left + bases[1], 0),
    )


@lru_cache(maxsize=1024)
def seconds_of(
    k: PackedSide, v: PackedSide, q_heads: int, device: Device, batch: int, coded: int,
    queries: int = 1,
) -> float:  # fmt: skip
    """Time of packed attention of one layer in one step.

    Args:
        k, v: its sides.
        q_heads: query heads.
        device: where it runs.
        batch: sequences.
        coded: tokens that are read from codes.
        queries: new tokens of the step.
    """
    values = {BATCH: batch, CODED: coded}
    return sum(
        value_of(launch.seconds(device), values)
        for launch in launches(k, v, q_heads, queries, device)
    )
