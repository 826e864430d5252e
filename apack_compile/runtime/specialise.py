"""Compile a rewritten graph with Inductor for the shapes at hand, and keep it to those shapes.

Storage tensors are not seen by Dynamo, so Dynamo's guards say nothing about their shapes. Each
compilation therefore gets a shape environment of its own; the conditions that tracing put on its
symbols become a guard that is checked before every run. Dimensions that Dynamo has as symbols,
payload capacities and batch sizes behind symbolic batches are symbols; all else is fixed. So are
Python floats that Dynamo does not take for constants (``dynamic=True``: a scale, an epsilon), which
come as tensors of one number: AOTAutograd would read out of them numbers that nothing is known of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    SYMPY_INTERP,
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from ..compat import FLOAT

Dynamic = tuple[DimDynamic, ...] | None
"""What is symbolic in an argument: one entry a dimension; one entry for an int; None: nothing."""


class Specialised:
    """One Inductor artifact with the guard of its shapes.

    Args:
        gm: the graph; Inductor takes it over.
        args: real arguments.
        dynamic: what is symbolic in each.
        compiler: makes code of the graph and fake arguments.
        loose: dimensions of each whose strides are symbols; None: of none, strides follow from
            sizes or are fixed.
    """

    def __init__(
        self, gm: fx.GraphModule, args: Sequence[Any], dynamic: Sequence[Dynamic],
        compiler: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
        loose: Sequence[tuple[int, ...]] | None = None,
    ) -> None:  # fmt: skip
        shape_env = ShapeEnv()
        mode = FakeTensorMode(shape_env=shape_env, static_shapes=False)
        fakes = [
            _fake(mode, shape_env, arg, dims, LocalSource(f"t{i}"), loose[i] if loose else ())
            for i, (arg, dims) in enumerate(zip(args, dynamic, strict=True))
        ]
        # Sizes 0 and 1 never become symbols, and no guard speaks of them.
        self._constants = [
            (i, j, int(size))
            for i, (fake, dims) in enumerate(zip(fakes, dynamic, strict=True))
            if dims is not None
            for j, size in enumerate(fake.shape if isinstance(fake, Tensor) else (fake,))
            if dims[j] is not DimDynamic.STATIC and not isinstance(size, torch.SymInt)
        ]
        self._floats = python_floats(gm, args)
        gm = _with_floats(gm, self._floats)
        _drop_example_values(gm)
        with tracing(TracingContext(mode)):
            self._call = compiler(gm, fakes)
        symbolic = [f for f in fakes if isinstance(f, (torch.SymInt, Tensor))]
        where = [i for i, f in enumerate(fakes) if isinstance(f, (torch.SymInt, Tensor))]
        self._guard, self._guarded = _compile_guard(shape_env, symbolic, where)

    def accepts(self, args: Sequence[Any]) -> bool:
        """Whether this artifact holds for these arguments' shapes."""
        for i, j, size in self._constants:
            arg = args[i]
            if (arg.shape[j] if isinstance(arg, Tensor) else arg) != size:
                return False
        if any(float(args[i]).hex() != value for i, value in self._floats):
            return False
        if self._guard is None:
            return True
        names = {f"t{n}": args[i] for n, i in self._guarded}
        return bool(eval(self._guard, SYMPY_INTERP, {"L": names}))

    def __call__(self, args: Sequence[Any]) -> Sequence[Any]:
        """Run on arguments that :meth:`accepts`."""
        return self._call(*args)


def _fake(
    mode: FakeTensorMode, env: ShapeEnv, arg: Any, dims: Dynamic, source: LocalSource,
    loose: Sequence[int],
) -> Any:  # fmt: skip
    if isinstance(arg, Tensor):
        if (dims is None and not loose) or not arg.dim():
            return mode.from_tensor(arg, static_shapes=True, source=source)
        strides = [DimDynamic.INFER_STRIDE] * arg.dim()
        for dim in loose:
            strides[dim] = DimDynamic.DYNAMIC
        context = StatelessSymbolicContext(
            dynamic_sizes=list(dims or [DimDynamic.STATIC] * arg.dim()), dynamic_strides=strides
        )
        return mode.from_tensor(arg, source=source, symbolic_context=context)
    if isinstance(arg, int) and not isinstance(arg, bool) and dims is not None:
        symbol = env.create_unspecified_symbol(arg, source, dims[0])
        return env.create_symintnode(symbol, hint=arg, source=source)
    return arg


def python_floats(gm: fx.GraphModule, args: Sequence[Any]) -> tuple[tuple[int, str], ...]:
    """Which arguments are Python floats that the graph reads, and their values, in hexadecimals."""
    inputs = enumerate(gm.graph.find_nodes(op="placeholder"))
    return tuple((i, float(args[i]).hex()) for i, n in inputs if n.meta.get(FLOAT) and _reads(n))


def _reads(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target == "item"]


def _with_floats(gm: fx.GraphModule, floats: Sequence[tuple[int, str]]) -> fx.GraphModule:
    """The same graph with the values of Python floats in place of reading them out of tensors."""
    if not floats:
        return gm
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    gm = fx.GraphModule(gm, graph)
    inputs = gm.graph.find_nodes(op="placeholder")
    for i, value in floats:
        for read in _reads(inputs[i]):
            instead = partial(_instead, read, float.fromhex(value))
            for user in list(read.users):
                user.args = fx.map_arg(user.args, instead)
                user.kwargs = fx.map_arg(user.kwargs, instead)
            gm.graph.erase_node(read)
    return gm


def _instead(old: fx.Node, new: float, node: fx.Node) -> fx.Node | float:
    return new if node is old else node


def _drop_example_values(gm: fx.GraphModule) -> None:
    """Forget Dynamo's example values: they belong to another shape environment."""
    for node in gm.graph.nodes:
        for name in ("example_value", "val", "grapharg"):
            node.meta.pop(name, None)


def _compile_guard(
    env: ShapeEnv, values: list[Any], where: list[int]
) -> tuple[Any, list[tuple[int, int]]]:
    """Code of the guard (None if there is nothing to check), and the arguments it reads."""
    text = env.produce_guards_expression(values)
    if not text:
        return None, []
    read = sorted({int(n) for n in re.findall(r"L\['t(\d+)'\]", text)})
    return compile(text, "<shape guard>", "eval"), [(n, where[n]) for n in read]
