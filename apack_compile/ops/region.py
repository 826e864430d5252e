"""Operators that Inductor compiles on their own, once for all layers of one kind.

A decoder has the same packed attention in every layer. Traced into the whole graph it would be
scheduled and generated thirty times over; as a region it is compiled once for each layout and
shape, when the first layer calls it, and the graph around it stays as small as the model's own.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import DimDynamic

from ..compat import compile_inner
from ..runtime.specialise import Dynamic, Specialised

INDUCTOR_CONFIG: ContextVar[dict[str, Any] | None] = ContextVar("apack_inductor", default=None)
"""Inductor settings of the graph that is running."""


class Grows(NamedTuple):
    """Which dimensions of a tensor are symbols.

    Attributes:
        batch: whether dimension 0 is the batch: a symbol unless it is 1, the same for all.
        dims: dimensions that grow with the sequence.
        alike: whether those are one symbol for all tensors (capacities) or each its own.
    """

    batch: bool = False
    dims: tuple[int, ...] = ()
    alike: bool = False


class Region:
    """Calls ``op`` through an Inductor artifact, made when a new kind of arguments comes.

    Args:
        op: an operator that tracing sees through.
        grows: from the operator's arguments, one entry for each tensor among them, in order.
        results: from the operator's arguments, the length of the list it returns; None if it
            returns one tensor.
    """

    def __init__(
        self,
        op: Any,
        grows: Callable[..., Sequence[Grows]],
        results: Callable[..., int] | None = None,
    ) -> None:
        self.op = op
        self.grows = grows
        self.results = results
        self._artifacts: dict[Any, list[Specialised]] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        """The operator's result."""
        leaves, spec = pytree.tree_flatten(args)
        leaves = [x.contiguous() if isinstance(x, Tensor) else x for x in leaves]
        marks = iter(self.grows(*args))
        dims = [_dynamic(x, next(marks)) if isinstance(x, Tensor) else None for x in leaves]
        key = tuple(_kind(x, d) for x, d in zip(leaves, dims, strict=True))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        artifact = self._find(key, tensors)
        if artifact is None:
            with self._lock:
                artifact = self._find(key, tensors) or self._compile(key, args, leaves, spec, dims)
        out = artifact(tensors)
        return out[0] if self.results is None else list(out)

    def _find(self, key: Any, tensors: list[Tensor]) -> Specialised | None:
        return next((a for a in self._artifacts.get(key, ()) if a.accepts(tensors)), None)

    def _compile(
        self, key: Any, args: Any, leaves: list[Any], spec: Any, dims: list[Dynamic]
    ) -> Specialised:
        graph = fx.Graph()
        nodes = [
            graph.placeholder(f"x{i}") if isinstance(x, Tensor) else x for i, x in enumerate(leaves)
        ]
        call = graph.call_function(self.op, pytree.tree_unflatten(nodes, spec))
        if self.results is None:
            graph.output((call,))
        else:
            count = self.results(*args)
            graph.output(
                tuple(graph.call_function(operator.getitem, (call, i)) for i in range(count))
            )
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        sizes = [d for x, d in zip(leaves, dims, strict=True) if isinstance(x, Tensor)]
        compiler = partial(compile_inner, "inductor", config=INDUCTOR_CONFIG.get() or {})
        with torch.no_grad():
            module = fx.GraphModule(torch.nn.Module(), graph)
            artifact = Specialised(module, tensors, sizes, compiler)
        self._artifacts.setdefault(key, []).append(artifact)
        return artifact


def _dynamic(x: Tensor, grows: Grows) -> Dynamic:
    sizes = [DimDynamic.STATIC] * x.dim()
    for dim in grows.dims:
        sizes[dim] = DimDynamic.DUCK if grows.alike else DimDynamic.DYNAMIC
    if grows.batch and x.shape[0] > 1:
        sizes[0] = DimDynamic.DUCK
    return tuple(sizes)


def _kind(x: Any, dims: Dynamic) -> Any:
    """What an artifact is for: everything about an argument but its symbolic sizes."""
    if not isinstance(x, Tensor):
        return x
    assert dims is not None
    fixed = (n if d is DimDynamic.STATIC else -1 for n, d in zip(x.shape, dims, strict=True))
    return (x.dtype, x.device, *fixed)
