"""From the operand of an attention back to the cached tensor: undo repeat_kv and casts.

    keys = cat([past, new], -2)                        [B, H, S, D]     <- root
    a = keys[:, :, None, :, :]                         [B, H, 1, S, D]
    b = a.expand(B, H, G, S, D)
    c = b.reshape(B, H * G, S, D)                      <- operand; or repeat_interleave(keys, G, 1)
    d = c.reshape(B * H * G, S, D)                     <- operand with heads side by side

Only forms that repeat each KV head G times in a row count; anything else stops the walk.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .base import argument, calls, same_size, shape_of
from .find_writes import is_written
from .regroup import lies_so, regrouped

_CASTS = ("to", "float", "half", "bfloat16", "double", "type_as")
_FULL = slice(None)


def walk_up(node: fx.Node) -> fx.Node:
    """The root of an operand: ``[B, H, S, D]``, neither a view nor a cast of another tensor."""
    while not is_written(node):  # else that is what attention reads, and not a view of the cache
        step = _repeat_kv(node) or _repeat_interleave(node) or _joined(node)
        if step is not None:
            node = step
        elif calls(node, "contiguous") or is_cast(node):
            node = node.args[0]
        else:
            break
    return node


def apart(node: fx.Node) -> fx.Node | None:
    """``[B, H, T, D]`` of an operand that is that, or ``[B * H, T, D]`` of it."""
    while len(shape_of(node) or ()) == 3 and not is_written(node):
        step = _joined(node)
        if step is None and (calls(node, "contiguous") or is_cast(node)):
            step = node.args[0]
        if step is None:
            return None
        node = step
    return node if len(shape_of(node) or ()) == 4 else None


def in_one_order(q: fx.Node, k: fx.Node, v: fx.Node, steps: tuple[fx.Node, ...]) -> bool:
    """Whether heads side by side with sequences are in the order of the keys at every step.

    Args:
        q, k, v: operands of the attention.
        steps: views between its products, and what they and itself give.
    """
    if all(len(shape_of(x) or ()) == 4 for x in (q, k, v, *steps)):
        return True
    keys, values = apart(k), apart(v)
    if keys is None or values is None:
        return False
    lead = (shape_of(q if len(shape_of(q) or ()) == 4 else keys) or ())[:2]
    return all(lies_so(x, lead) for x in (q, keys, values, *steps))


def _joined(node: fx.Node) -> fx.Node | None:
    """``x [B, H, T, D]`` whose heads lie side by side in ``node [B * H, T, D]``."""
    root = regrouped(node) if len(shape_of(node) or ()) == 3 else None
    return root if len(shape_of(root) or ()) == 4 else None


def is_cast(node: Any) -> bool:
    """Whether ``node`` is another floating-point dtype of its operand, on the same device."""
    if not calls(node, *_CASTS) or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("example_value"), node.meta.get("example_value")
    if before is None or after is None or before.device != after.device:
        return False
    return bool(before.is_floating_point() and after.is_floating_point())


def _repeat_kv(node: fx.Node) -> fx.Node | None:
    if not calls(node, "reshape", "view", torch.reshape):
        return None
    expand = argument(node, 0, "input")
    if not calls(expand, "expand"):
        return None
    root = _with_inserted_dim(expand.args[0])
    if root is None:
        return None
    source, wide, flat = shape_of(root), shape_of(expand), shape_of(node)
    if source is None or wide is None or flat is None or len(source) != 4 or len(flat) != 4:
        return None
    groups = wide[2]
    if not isinstance(groups, int) or len(wide) != 5:
        return None
    batch, heads, length, dim = source
    wanted = (batch, heads * groups, length, dim)
    if not all(same_size(a, b) for a, b in zip(flat, wanted, strict=True)):
        return None
    return root


def _with_inserted_dim(node: fx.Node) -> fx.Node | None:
    """``x`` of ``x[:, :, None]`` or ``x.unsqueeze(2)``."""
    if calls(node, "unsqueeze", torch.unsqueeze):
        root = argument(node, 0, "input")
        return root if argument(node, 1, "dim") in (2, -3) else None
    if not calls(node, operator.getitem):
        return None
    root, index = node.args
    if not isinstance(index, tuple) or not isinstance(root, fx.Node):
        return None
    rest = [i for i in index if i is not Ellipsis]
    inserted = rest[:3] == [_FULL, _FULL, None] and all(i == _FULL for i in rest[3:])
    return root if inserted else None


def _repeat_interleave(node: fx.Node) -> fx.Node | None:
    if not calls(node, "repeat_interleave", torch.repeat_interleave):
        return None
    root, repeats = argument(node, 0, "input"), argument(node, 1, "repeats")
    dim = argument(node, 2, "dim")
    source = shape_of(root)
    if not isinstance(root, fx.Node) or not isinstance(repeats, int) or source is None:
        return None
    return root if len(source) == 4 and dim in (1, -3) else None
