"""Find what a graph writes to in place, itself or through a view.

    packed.mul_(2)          packed[:, :, :4] = 0          torch.add(packed, 1, out=packed)

A packed input that is written to is unpacked, and what it holds at the end replaces its content.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

_VIEWS = frozenset(
    (
        "getitem", "view", "reshape", "transpose", "permute", "narrow", "select", "expand",
        "unsqueeze", "squeeze", "flatten", "unflatten", "chunk", "split", "detach", "contiguous",
        "view_as", "swapaxes", "swapdims", "movedim", "moveaxis", "unbind", "t", "T", "mT",
        "expand_as", "diagonal", "as_strided", "unfold", "tensor_split", "slice", "alias", "real",
        "imag", "ravel", "broadcast_to", "data",
        # these are their operand itself if there is nothing to convert
        "to", "type", "type_as", "float", "half", "bfloat16", "double", "cuda", "cpu",
    )
)  # fmt: skip

_IN_PLACE = (
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
    operator.ifloordiv, operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
)  # fmt: skip


def is_written(node: fx.Node) -> bool:
    """Whether ``node``, or a view of it, is the target of an in-place operation."""
    return any(writes(user, node) for user in node.users)


def writes(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` writes to ``node``, or is a view of it that is written to."""
    if node in written(user):
        return True
    return _is_view(user) and user.args[:1] == (node,) and is_written(user)


def written_between(node: fx.Node, first: fx.Node, last: fx.Node) -> bool:
    """Whether ``node``, or what it is a view of, is written to between two other nodes.

    What is read at ``first`` then is something else at ``last``.
    """
    base, here = base_of(node), first.next
    while here is not last and here.op != "root":
        if any(base_of(target) is base for target in written(here)):
            return True
        here = here.next
    return False


def written(node: fx.Node) -> list[fx.Node]:
    """Arguments that a call writes to: by its schema, or by what its name means."""
    if node.op not in ("call_function", "call_method"):
        return []
    found = [*_by_schema(node), *_by_name(node)]
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, fx.Node)]


def _by_schema(node: fx.Node) -> Iterator[Any]:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        overloads = [target]
    elif isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
    else:
        return
    for overload in overloads:
        for position, info in enumerate(overload._schema.arguments):
            if info.alias_info is not None and info.alias_info.is_write:
                if info.name in node.kwargs:
                    yield node.kwargs[info.name]
                elif not info.kwarg_only and position < len(node.args):
                    yield node.args[position]


def _by_name(node: fx.Node) -> Iterator[Any]:
    name = name_of(node)
    if isinstance(node.target, torch._ops.HigherOrderOperator) and "mutation" in name:
        yield from node.all_input_nodes  # a Triton kernel of the user's: any of them
    in_place = name.endswith("_") and not name.endswith("__")
    in_place |= name == "__setitem__" or node.target in _IN_PLACE
    if in_place or node.kwargs.get("inplace") is True:
        yield node.args[0] if node.args else node.kwargs.get("input")
    yield node.kwargs.get("out")


def base_of(node: fx.Node) -> fx.Node:
    """What ``node`` is a view of, or may be: ``node`` itself if it is none."""
    while _is_view(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _is_view(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return any(r.alias_info is not None for r in node.target._schema.returns)
    return name_of(node) in _VIEWS


def name_of(node: fx.Node) -> str:
    """Of the function or method called, without its overload."""
    target: Any = node.target
    if target is getattr:
        target = node.args[1]
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    return target if isinstance(target, str) else getattr(target, "__name__", "")
