"""Numbers that are known when a graph is compiled, however the graph spells them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from .base import argument, calls, value_of
from .find_writes import is_written
from .views import is_cast

_FILLED: dict[Any, tuple[int, str]] = {
    torch.full: (1, "fill_value"),
    torch.full_like: (1, "fill_value"),
    "new_full": (2, "fill_value"),
    torch.tensor: (0, "data"),
    torch.scalar_tensor: (0, "s"),
    torch.as_tensor: (0, "data"),
    "new_tensor": (1, "data"),
}
"""What makes a tensor of one number, and where that stands among its arguments."""


def number(value: Any) -> float | None:
    """A constant; with dynamic=True it may be a symbol, which Dynamo then guards.

    None if it varies: a guard would hold the graph to one length of the cache, and what is read out
    of a tensor has none.
    """
    value = value_of(value)
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return None if varies(value) else float(value)
    return value if isinstance(value, (int, float)) else None


def varies(value: Any) -> bool:
    """Whether a number is made of sizes or other whole numbers that are symbols, or of a tensor."""
    value = value_of(value)
    if not isinstance(value, (torch.SymFloat, torch.SymInt)):
        return False
    whole = any(symbol.is_integer for symbol in value.node.expr.free_symbols)
    return whole or bool(free_unbacked_symbols(value))


def filled_with(value: Any) -> float | None:
    """A constant, or the number that every element of a tensor is: ``torch.tensor(-inf)``."""
    if not isinstance(value, fx.Node):
        return number(value)
    tensor, node = value_of(value), value
    if not isinstance(tensor, torch.Tensor):
        return number(value)
    while is_cast(node) and not is_written(node):
        node = node.args[0]
    if is_written(node) or not calls(node, *_FILLED) or tensor.dtype == torch.bool:
        return None
    found = number(argument(node, *_FILLED[node.target]))
    return None if found is None else torch.tensor(found, dtype=tensor.dtype, device="cpu").item()
