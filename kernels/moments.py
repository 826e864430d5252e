"""Second moments of one prefill, for fitting: ``apack::moments``."""

from __future__ import annotations

from torch import Tensor

from ..codec.moments import Moments


def moments(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> list[Tensor]:
    """The tensors of :meth:`Moments.of`."""
    return list(Moments.of(q, k, v, visible).tensors())
