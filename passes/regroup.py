"""Heads side by side with sequences: ``[B, H, T, D]`` seen as ``[B * H, T, D]``, and back.

    q, k, v = (x.reshape(B * H, -1, x.shape[-1]) for x in (q, k, v))
    p = softmax(bmm(q, k.transpose(1, 2)).view(B, H, Q, S) + mask, -1)
    o = bmm(p.view(B * H, Q, S), v)                                        [B * H, Q, Dv]

Row ``i`` of such a product is head ``i % H`` of sequence ``i // H`` if its keys lie in that order.
A view keeps the order if no size but the first two changes; what is transposed before lies in
another one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .base import argument, calls, same_size, shape_of, value_of

VIEWS = ("view", "reshape", "flatten", "unflatten", torch.reshape, torch.flatten, torch.unflatten)


def regrouped(node: Any) -> fx.Node | None:
    """``x`` of which ``node`` is the same numbers in the same order, heads joined, apart or as is.

    None if ``node`` is no view of three or four dimensions, or its sizes are not proven.
    """
    x = argument(node, 0, "input") if calls(node, *VIEWS) else None
    before, after = shape_of(x), shape_of(node)
    if not isinstance(x, fx.Node) or before is None or after is None:
        return None
    if value_of(x).dtype != value_of(node).dtype or not {len(before), len(after)} <= {3, 4}:
        return None
    same = same_sizes(before[-2:], after[-2:])
    if len(before) == len(after):
        same = same and same_sizes(before, after)
    else:
        same = same and same_size(_rows(before), _rows(after))
    return x if same else None


def lies_so(node: fx.Node, lead: tuple[Any, Any]) -> bool:
    """Whether ``node`` is ``[B, H, ., .]`` or ``[B * H, ., .]``, provably, for ``lead = B, H``."""
    shape = shape_of(node)
    if shape is None or len(shape) not in (3, 4):
        return False
    if len(shape) == 4:
        return same_sizes(shape[:2], lead)
    return same_size(shape[0], lead[0] * lead[1])


def same_sizes(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two tuples of sizes are provably equal."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def _rows(shape: tuple[Any, ...]) -> Any:
    """``B * H``, of either shape."""
    return shape[0] * shape[1] if len(shape) == 4 else shape[0]
