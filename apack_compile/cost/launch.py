"""One kernel of a step: what it moves and what it computes."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from .device import Device
from .symbols import Expr


@dataclass(frozen=True)
class Launch:
    """One kernel of a step.

    Attributes:
        name: of the kernel.
        moved: bytes.
        work: seconds of what is not the moving of bytes.
    """

    name: str
    moved: Expr = 0
    work: Expr = 0

    def seconds(self, device: Device) -> Expr:
        """What it takes (roofline)."""
        return device.launch + sympy.Max(self.moved / device.bandwidth, self.work)
