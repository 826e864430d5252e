"""Second moments of one prefill, for fitting: ``apack::moments``."""

from __future__ import annotations

from torch import Tensor

from ..codec.moments import Moments
from ..codec.rotation import Turn


def moments(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, visual: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, sinks: int,
) -> list[Tensor]:  # fmt: skip
    """The tensors of :meth:`Moments.of`; with ``visual``, those of visual tokens behind them.

    Args:
        q, k, v, visible, sinks: as there.
        visual: ``[B, S]`` bool: tokens of an image; None: there are none, or they are not known.
        cos, sin, interleaved: the rotation of the keys, as the graph has it; None: not known.
    """
    turn = Turn.of(cos, sin, interleaved, k.shape[2])
    sums = list(Moments.of(q, k, v, visible, turn, sinks).tensors())
    if visual is not None:
        sums += Moments.of(q, k, v, visible, turn, sinks, visual).tensors()
    return sums
