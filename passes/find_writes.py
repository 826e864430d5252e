"""Find packed inputs that the graph writes to in place, itself or through a view.

    packed.mul_(2)          packed[:, :, :4] = 0          torch.add(packed, 1, out=packed)

Such an input is unpacked, and what it holds at the end replaces its content.
"""

from __future__ import annotations

import operator

from torch import fx

from .base import calls

_VIEWS = (
    operator.getitem, "view", "reshape", "transpose", "permute", "narrow", "select", "expand",
    "unsqueeze", "squeeze", "flatten", "unflatten", "chunk", "split", "detach", "contiguous",
    "view_as", "swapaxes", "movedim", "unbind", "t", "mT",
)  # fmt: skip

_IN_PLACE = (
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
    operator.ifloordiv, operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
)  # fmt: skip


def is_written(node: fx.Node) -> bool:
    """Whether ``node``, or a view of it, is the target of an in-place operation."""
    for user in node.users:
        if user.kwargs.get("out") is node or _writes(user, node):
            return True
        if calls(user, *_VIEWS) and user.args and user.args[0] is node and is_written(user):
            return True
    return False


def writers(graph: fx.Graph) -> set[fx.Node]:
    """The in-place operations of a graph."""
    return {
        user
        for node in graph.nodes
        for user in node.users
        if user.kwargs.get("out") is node or _writes(user, node)
    }


def _writes(user: fx.Node, node: fx.Node) -> bool:
    if not user.args or user.args[0] is not node:
        return False
    if user.op == "call_method":
        name = str(user.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if user.op != "call_function":
        return False
    name = getattr(user.target, "__name__", "")
    return user.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
