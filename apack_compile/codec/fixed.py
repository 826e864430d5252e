"""Codes that need no fit: tokens as they are, or rounded to 8 or 4 bits head by head."""

from __future__ import annotations

from functools import cache

import torch

from .code import Code, CodeRef
from .exact import ExactLayout
from .transform import TransformLayout

BITS = {"int8": 8, "int4": 4}
"""Bits of a number. Every token and head has a 16-bit gain: its largest magnitude."""

TYPICAL = 256.0
"""Numbers of any layer will do: from 1e-3 to 1e6 they are what they are."""

FIXED = ("exact", *BITS)


def fixed_code(name: str, heads: int, dim: int) -> Code:
    """The code ``name`` of ``FIXED`` for ``heads`` heads of ``dim`` numbers.

    Two numbers of 4 bits share a byte: heads of odd size are kept exact.
    """
    if name == "exact" or dim * BITS[name] % 8:
        return Code(ExactLayout(heads, dim))
    bits = BITS[name]
    counts = (dim, 0, 0) if bits == 8 else (0, dim, 0)
    layout = TransformLayout(heads, dim, heads, *counts, gain=2)
    plain = torch.eye(dim).expand(heads, -1, -1).contiguous()
    # The largest magnitude is half a step beyond the centre of the outermost level.
    nothing = torch.zeros(heads, dim, dim), torch.zeros(heads, dim)  # expected: no strain
    whiten = torch.full((heads, dim), 2.0 ** (1 - bits))
    params = layout.params_of(torch.zeros(heads, dim), plain, plain, *nothing, whiten, TYPICAL)
    return Code(layout, tuple(params))


@cache
def fixed_ref(name: str, heads: int, dim: int) -> CodeRef:
    """A ref to :func:`fixed_code`, the same for all caches."""
    return CodeRef(fixed_code(name, heads, dim))
