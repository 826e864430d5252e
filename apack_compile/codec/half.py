"""Matrices of a code in 16 bits: half the memory, and products that tensor cores take as they are.

A basis is rounded once, when it is fitted, so that what is coded and what is read agree. Each
column (or row) is divided by its largest number, which is kept in float32: float16 then has 11 bits
for whatever scale a component has.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = torch.float16

MOST = 65504.0
"""The largest float16."""


def halved(matrix: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``matrix`` as float16 numbers up to 1, and the float32 units to multiply them by.

    Args:
        matrix: of any shape; one unit for all numbers along ``dim``.
        dim: where the units have size 1, and are left out.
    """
    units = matrix.abs().amax(dim, keepdim=True).float()
    units = torch.where(units > 0, units, 1.0)
    return (matrix / units).to(HALF), units.squeeze(dim)


def power_of_two(size: Tensor) -> Tensor:
    """The least power of two that is at least ``size`` (float32); 1 for 0."""
    known = size.float().clamp(1e-30, 1e30)
    return torch.where(size > 0, torch.exp2(known.log2().ceil()), 1.0)
