"""The paper's mode: what the code of one side of one layer is for one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, fx

from ..codec import CodeRef, LowRankLayout
from ..codec.rotation import Turn
from ..fitting.learn import MOST_STRAYS
from ..kernels.factor import factor_prompt
from ..options import Options
from ..passes.plan import PlannedSite


class PaperSide(NamedTuple):
    """Keys or values of one layer.

    Attributes:
        keys: whether these are keys.
        turn: the rotation of keys, where it is known.
        visible: ``[B, S]``, or None.
    """

    keys: bool
    turn: Turn | None
    visible: Tensor | None


def paper_sites(
    sites: Sequence[PlannedSite], turns: Sequence[Turn | None], seen: Sequence[Tensor | None]
) -> dict[fx.Node, PaperSide]:
    """Both sides of every site, by the node of their update."""
    sides: dict[fx.Node, PaperSide] = {}
    for planned, turn, visible in zip(sites, turns, seen, strict=True):
        sides.setdefault(planned.cached.k.node, PaperSide(True, turn, visible))
        sides.setdefault(planned.cached.v.node, PaperSide(False, None, visible))
    return sides


def paper_code(x: Tensor, side: PaperSide, options: Options) -> CodeRef:
    """The code of a prompt's keys or values ``x [B, H, S, D]``.

    Keys are factored before their rotation if that is a plain count of positions.
    """
    heads, dim = x.shape[1], x.shape[3]
    rank = options.k_rank if side.keys else options.v_rank
    rank = min(rank or max(int(heads * dim / options.ratio), 1), heads * dim)
    rotation = None if side.turn is None else side.turn.rotation(dim, side.visible)
    if rotation is None or rotation.strays > MOST_STRAYS:
        return factor_prompt(x, LowRankLayout(heads, dim, rank), None, side.visible)
    layout = LowRankLayout(heads, dim, rank, rotation.width, int(rotation.interleaved))
    return factor_prompt(x, layout, rotation.waves, side.visible)
