"""What the nodes of a graph are, with symbolic sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensorMode


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.mode = mode
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = self.mode.from_tensor(value, static_shapes=True)
        self.values[n] = value
        return value


def values_of(gm: fx.GraphModule, fakes: Sequence[Any], mode: FakeTensorMode) -> dict[fx.Node, Any]:
    """The value of each node for fake arguments.

    Args:
        gm: the graph.
        fakes: its arguments, of ``mode``.
        mode: where the nodes run.
    """
    recorder = _Recorder(gm, mode)
    with mode, torch.no_grad():
        recorder.run(*fakes)
    return recorder.values


def is_mapped(value: Any) -> bool:
    """Whether a value has a tensor inside a ``vmap``: it has no storage, and no meaning outside."""
    leaves = pytree.tree_leaves(value)
    return any(isinstance(x, Tensor) and is_functorch_wrapped_tensor(x) for x in leaves)


def symbols(value: Any) -> set[sympy.Symbol]:
    """Symbols that the sizes and strides of a value speak of."""
    found: set[sympy.Symbol] = set()
    for leaf in pytree.tree_leaves(value):
        sizes: tuple[Any, ...] = (leaf,)
        if isinstance(leaf, Tensor):
            sizes = (*leaf.shape, *leaf.stride(), leaf.storage_offset())
        for size in sizes:
            if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
                found |= size.node.expr.free_symbols
    return found
