"""Second moments of one prefill, for fitting: ``apack::moments``."""

from __future__ import annotations

from torch import Tensor

from ..codec.moments import Moments
from ..codec.rotation import Turn


def moments(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, sinks: int,
) -> list[Tensor]:  # fmt: skip
    """The tensors of :meth:`Moments.of`.

    Args:
        q, k, v, visible, sinks: as there.
        cos, sin, interleaved: the rotation of the keys, as the graph has it; None: not known.
    """
    turn = Turn.of(cos, sin, interleaved, k.shape[2])
    return list(Moments.of(q, k, v, visible, turn, sinks).tensors())
