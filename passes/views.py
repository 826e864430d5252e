"""From the operand of an attention back to the cached tensor: undo repeat_kv and casts.

    keys = cat([past, new], -2)                        [B, H, S, D]     <- root
    a = keys[:, :, None, :, :]                         [B, H, 1, S, D]
    b = a.expand(B, H, G, S, D)
    c = b.reshape(B, H * G, S, D)                      <- operand; or repeat_interleave(keys, G, 1)
    d = c.reshape(B * H * G, S, D)                     <- operand with heads side by side
    e = keys.reshape(B * H, S, D)
    f = repeat_interleave(e, G, 0)                     <- the same; or expand and reshape
    g = keys.expand(B, G, S, D)                        <- operand, if H is 1

Only forms that repeat each KV head G times in a row count; anything else stops the walk.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .base import argument, calls, shape_of
from .find_writes import is_written
from .regroup import lies_so, regrouped, same_sizes

_CASTS = ("to", "float", "half", "bfloat16", "double", "type_as")
_FULL = slice(None)


def walk_up(node: fx.Node) -> fx.Node:
    """The root of an operand: ``[B, H, S, D]``, neither a view nor a cast of another tensor."""
    while not is_written(node):  # else that is what attention reads, and not a view of the cache
        repeated = _repeated(node)
        step = _joined(node) if repeated is None else repeated[0]
        if step is not None:
            node = step
        elif calls(node, "contiguous") or is_cast(node):
            node = node.args[0]
        else:
            break
    return node


def lead_of(node: fx.Node) -> tuple[Any, Any] | None:
    """B and H of an operand ``[B, H, T, D]``, or of ``[B * H, T, D]`` made of one; else None."""
    groups = 1
    while len(shape_of(node) or ()) == 3 and not is_written(node):
        repeated = _repeated(node)
        step = _joined(node) if repeated is None else repeated[0]
        groups *= 1 if repeated is None else repeated[1]
        if step is None and (calls(node, "contiguous") or is_cast(node)):
            step = node.args[0]
        if step is None:
            return None
        node = step
    shape = shape_of(node) or ()
    return (shape[0], shape[1] * groups) if len(shape) == 4 else None


def in_one_order(q: fx.Node, k: fx.Node, v: fx.Node, steps: tuple[fx.Node, ...]) -> bool:
    """Whether heads side by side with sequences are in the order of the keys at every step.

    Args:
        q, k, v: operands of the attention.
        steps: views between its products, and what they and itself give.
    """
    if all(len(shape_of(x) or ()) == 4 for x in (q, k, v, *steps)):
        return True
    keys, values = lead_of(k), lead_of(v)
    if keys is None or values is None:
        return False
    sizes = shape_of(q) or ()
    lead = (sizes[0], sizes[1]) if len(sizes) == 4 else keys
    same = same_sizes(keys, lead) and same_sizes(values, lead)
    return same and all(lies_so(x, lead) for x in (q, *steps))


def _joined(node: fx.Node) -> fx.Node | None:
    """``x [B, H, T, D]`` whose heads lie side by side in ``node [B * H, T, D]``; or the same."""
    root = regrouped(node)
    return None if len(shape_of(root) or ()) < len(shape_of(node) or ()) else root


def is_cast(node: Any) -> bool:
    """Whether ``node`` is another floating-point dtype of its operand, on the same device."""
    if not calls(node, *_CASTS) or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("example_value"), node.meta.get("example_value")
    if before is None or after is None or before.device != after.device:
        return False
    return bool(before.is_floating_point() and after.is_floating_point())


def _repeated(node: fx.Node) -> tuple[fx.Node, int] | None:
    """What ``node`` repeats each head of, and how often."""
    return _repeat_kv(node) or _repeat_interleave(node) or _one_head(node)


def _repeat_kv(node: fx.Node) -> tuple[fx.Node, int] | None:
    if not calls(node, "reshape", "view", torch.reshape):
        return None
    expand = argument(node, 0, "input")
    if not calls(expand, "expand"):
        return None
    source, wide, flat = _with_inserted_dim(expand.args[0]), shape_of(expand), shape_of(node)
    before = shape_of(source)
    if source is None or before is None or wide is None or flat is None:
        return None
    rank = len(before)
    if rank not in (3, 4) or len(wide) != rank + 1 or len(flat) != rank:
        return None
    groups = wide[rank - 2]
    return (source, groups) if _holds(before, groups, flat) else None


def _with_inserted_dim(node: fx.Node) -> fx.Node | None:
    """``x`` of ``x[:, :, None]`` or ``x.unsqueeze(2)``; of three dimensions ``x[:, None]``."""
    root = argument(node, 0, "input")
    at = len(shape_of(root) or ()) - 2  # behind heads
    if not isinstance(root, fx.Node):
        return None
    if calls(node, "unsqueeze", torch.unsqueeze):
        return root if argument(node, 1, "dim") in (at, -3) else None
    if not calls(node, operator.getitem) or not isinstance(node.args[1], tuple):
        return None
    rest = [i for i in node.args[1] if i is not Ellipsis]
    inserted = rest[: at + 1] == [*[_FULL] * at, None] and all(i == _FULL for i in rest[at + 1 :])
    return root if inserted else None


def _repeat_interleave(node: fx.Node) -> tuple[fx.Node, int] | None:
    if not calls(node, "repeat_interleave", torch.repeat_interleave):
        return None
    root, repeats = argument(node, 0, "input"), argument(node, 1, "repeats")
    dim, rank = argument(node, 2, "dim"), len(shape_of(root) or ())
    if not isinstance(root, fx.Node) or not isinstance(repeats, int):
        return None
    return (root, repeats) if rank in (3, 4) and dim in (rank - 3, -3) else None


def _one_head(node: fx.Node) -> tuple[fx.Node, int] | None:
    if not calls(node, "expand", torch.Tensor.expand, "repeat"):
        return None
    root = argument(node, 0, "input")
    before, after = shape_of(root), shape_of(node)
    if before is None or after is None or len(before) != 4 or len(after) != 4 or before[1] != 1:
        return None
    return (root, after[1]) if _holds(before, after[1], after) else None


def _holds(before: tuple[Any, ...], groups: Any, after: tuple[Any, ...]) -> bool:
    """Whether ``after`` are sizes with each head ``groups`` times, a number that is known."""
    if not isinstance(groups, int):
        return False
    at = len(before) - 3
    return same_sizes(after, (*before[:at], before[at] * groups, *before[at + 1 :]))
