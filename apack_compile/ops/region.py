"""Operators that Inductor compiles on their own, once for all layers of one kind.

A decoder has the same packed attention in every layer. Traced into the whole graph it would be
scheduled and generated thirty times over; as a region it is compiled once for each layout and
shape, when the first layer calls it, and the graph around it stays as small as the model's own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import DimDynamic

from ..compat import COMPILING, compile_inner
from ..runtime.specialise import Dynamic, Specialised


class Caller(NamedTuple):
    """The graph that is running.

    Attributes:
        config: its Inductor settings.
        key: the same, to be compared.
        compiled: called when a region is compiled for it.
    """

    config: Mapping[str, Any]
    key: tuple[tuple[str, str], ...]
    compiled: Callable[[], None]


def config_key(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Inductor settings, to compare them: passes by the digest that Inductor caches them by."""
    texts = ((k, repr(v.uuid() if hasattr(v, "uuid") else v)) for k, v in config.items())
    return tuple(sorted(texts))


NOBODY = Caller({}, (), lambda: None)

CALLER: ContextVar[Caller] = ContextVar("apack_caller", default=NOBODY)

_REGIONS: WeakSet[Region] = WeakSet()


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
        _REGIONS.add(self)

    def clear(self) -> None:
        """Forget what was compiled."""
        self._artifacts = {}

    def __call__(self, *args: Any) -> Any:
        """The operator's result."""
        leaves, spec = pytree.tree_flatten(args)
        leaves = [x.contiguous() if isinstance(x, Tensor) else x for x in leaves]
        marks = iter(self.grows(*args))
        dims = [_dynamic(x, next(marks)) if isinstance(x, Tensor) else None for x in leaves]
        kinds = tuple(_kind(x, d) for x, d in zip(leaves, dims, strict=True))
        key = (CALLER.get().key, *kinds)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        artifact = self._find(key, tensors)
        if artifact is None:
            with COMPILING:  # another thread may be doing so
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
        caller = CALLER.get()
        compiler = partial(compile_inner, "inductor", config=dict(caller.config))
        with torch.no_grad():
            module = fx.GraphModule(torch.nn.Module(), graph)
            artifact = Specialised(module, tensors, sizes, compiler)
        self._artifacts.setdefault(key, []).append(artifact)
        caller.compiled()
        return artifact


def clear_regions() -> None:
    """Forget everything that regions compiled."""
    for region in tuple(_REGIONS):
        region.clear()


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
