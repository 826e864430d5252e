"""What launches of one step share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..side import Side
from .plan import Config


class Step(NamedTuple):
    """What one step of one layer asks for, see ``launch.attend_packed``."""

    q: Tensor
    bias: Tensor | None
    keys: Side
    values: Side
    lengths: Tensor
    factor: float
    softcap: float
    config: Config | None

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A new tensor on the device of the queries."""
        return torch.empty(shape, dtype=dtype, device=self.q.device)
