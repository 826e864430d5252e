"""Levels of tokens, taken out of the payload of a code that is part of another, and put back.

A code with planes says in one byte a token which of them it is in (``layout.py``). What is made of
such codes has one byte for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .layout import Layout

T = TypeVar("T")


def stored_tensors(code: Layout) -> int:
    """Payload tensors of a code, its levels not counted."""
    return len(code.payload_fields(torch.float32)) - bool(code.shares)


def without_levels(code: Layout, payload: Sequence[T]) -> list[T]:
    """The payload tensors of a code, or what is said of each, but for the levels."""
    inside = list(payload)
    if code.shares:
        del inside[code.tokenwise - 1]
    return inside


def with_levels(code: Layout, tensors: Sequence[Tensor], levels: Tensor) -> list[Tensor]:
    """The payload of a code, with its ``levels [B, T]`` where they belong."""
    payload = list(tensors)
    if code.shares:
        payload.insert(code.tokenwise - 1, levels[..., None])
    return payload
