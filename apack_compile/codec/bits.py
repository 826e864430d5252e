"""Small unsigned integers in bytes, in planes that a kernel can stream.

A run of ``n`` b-bit codes takes ``n * b / 8`` bytes. Byte ``i`` of the run holds the codes
``i, i + n*b/8, i + 2*n*b/8, ...`` from the low bits up, so that unpacking is a mask or a shift
of the whole run, never a shuffle.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLASSES = (8, 4, 2)
"""Bit classes in storage order; a component of class 0 is not stored."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """``codes [..., n]`` (values 0 .. 2**bits - 1) to ``uint8 [..., n * bits / 8]``."""
    if bits == 8:
        return codes.to(torch.uint8)
    per_byte = 8 // bits
    planes = codes.to(torch.uint8).unflatten(-1, (per_byte, -1))  # [..., per_byte, bytes]
    packed = planes.select(-2, 0)
    for i in range(1, per_byte):
        packed = packed | (planes.select(-2, i) << (bits * i))
    return packed


def unpack(packed: Tensor, bits: int) -> list[Tensor]:
    """``uint8 [..., bytes]`` to its planes, ``8 / bits`` tensors ``uint8 [..., bytes]``."""
    if bits == 8:
        return [packed]
    mask = (1 << bits) - 1
    return [(packed >> (bits * i)) & mask for i in range(8 // bits)]
