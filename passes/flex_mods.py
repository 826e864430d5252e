"""Read the two functions that are given to flex_attention, operator by operator.

    def score_mod(score, b, h, q, k): return cap * tanh(score / cap) + slopes[h] * (k - q)
    def mask_mod(b, h, q, k): return (q + offset >= k) & padding[b, k]
        ->  Scores(factor=1 / cap, cap=cap, added=slopes[h] * (k - q)), value

Both were traced for one score, and its indices are numbers there. Here they stand for all scores at
once: indices are ``[B, 1, 1, 1]``, ``[1, H, 1, 1]``, ``[1, 1, Q, 1]`` and ``[1, 1, 1, S]``. That is
the same for what works on every element alone, and for what looks captured tensors up at all of
their dimensions. All else is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from .base import output_of, value_of
from .find_writes import name_of
from .flex_ops import BINARY, CASTS, UNARY, plain_name
from .flex_records import INDICES, ONE, ROUNDED, Ref, Scores, Step, Unread
from .flex_scores import of_scores

aten = torch.ops.aten

WHERE = {
    (True, True): aten.where.self,
    (True, False): aten.where.ScalarOther,
    (False, True): aten.where.ScalarSelf,
    (False, False): aten.where.Scalar,
}
"""By whether what is chosen are tensors."""


@dataclass(frozen=True)
class _Table:
    """A captured tensor that was looked up at some of its dimensions, the first ones."""

    node: fx.Node
    at: tuple[Any, ...] = ()


class Reader:
    """Reads the functions of one call; equal steps are one.

    Args:
        dtype: that scores are computed in.
        device: of the queries.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._steps: dict[Step, Ref] = {}

    @property
    def steps(self) -> tuple[Step, ...]:
        """What was read."""
        return tuple(self._steps)

    def scores(self, function: fx.GraphModule, captured: Sequence[Any]) -> Scores:
        """What a score_mod does.

        Raises:
            Unread: that is not known.
        """
        found = self._run(function, [Scores(), *map(Ref, range(-INDICES, 0))], captured)
        if not isinstance(found, Scores):
            raise Unread("its result does not come from the score")
        return found

    def mask(self, function: fx.GraphModule, captured: Sequence[Any]) -> Ref | None:
        """What a mask_mod says is seen; None: everything.

        Raises:
            Unread: that is not known.
        """
        result = output_of(function.graph).args[0]
        found = self._run(function, list(map(Ref, range(-INDICES, 0))), captured)
        value = value_of(result)
        if not isinstance(found, Ref) or getattr(value, "dtype", None) != torch.bool:
            raise Unread("its result is not bool")
        return None if self._is_true(found) else found

    def both(self, a: Ref | None, b: Ref | None) -> Ref | None:
        """What is seen by both; None: everything."""
        if a is None or b is None:
            return a or b
        return self.call(aten.logical_and.default, a, b)

    # Running -------------------------------------------------------------------------------------

    def _run(self, function: fx.GraphModule, first: list[Any], captured: Sequence[Any]) -> Any:
        inputs = [*first, *map(self._captured, captured)]
        known: dict[fx.Node, Any] = {}
        places = function.graph.find_nodes(op="placeholder")
        if len(places) != len(inputs):
            raise Unread("its arguments are not those of flex_attention")
        known.update(zip(places, inputs, strict=True))

        def item(value: Any) -> Any:
            return known[value] if isinstance(value, fx.Node) else value

        for node in function.graph.nodes:
            if node.op == "output":
                result = node.args[0]
                return item(result[0] if isinstance(result, (tuple, list)) else result)
            if node.op == "placeholder":
                continue
            if node.op not in ("call_function", "call_method"):
                raise Unread(f"it holds a {node.op}")
            args = fx.map_arg(node.args, item)
            kwargs = fx.map_arg(node.kwargs, item)
            known[node] = self._evaluate(node, args, kwargs)
        raise Unread("it has no result")

    def _captured(self, value: Any) -> Any:
        """A tensor that is no number, a tensor of one number, or an int or float."""
        tensor = value_of(value)
        if not isinstance(value, fx.Node) or not isinstance(tensor, torch.Tensor):
            return value
        if tensor.device != self.device:
            raise Unread("it captures a tensor of another device")
        return _Table(value) if tensor.dim() else self.call(aten.reshape.default, value, ONE)

    def call(self, target: OpOverload, *args: Any) -> Ref:
        """The result of a step; equal steps are one."""
        step = Step(target, args, tuple(map(type, args)))
        return self._steps.setdefault(step, Ref(len(self._steps)))

    def _evaluate(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        name = plain_name(name_of(node))
        every = [*args, *kwargs.values()]
        if any(isinstance(a, Scores) for a in every):
            return of_scores(self, name, node, args, kwargs)
        if name in ("getitem", "index"):
            return self._looked_up(node, args)
        if any(isinstance(a, _Table) for a in every):
            raise Unread(f"{name} of a captured tensor as a whole")
        if not any(isinstance(a, Ref) for a in every):
            raise Unread(f"{name} of no tensor")
        if name in CASTS:
            return self._cast(name, node, args, kwargs)
        if name in ("new_ones", "new_zeros"):
            return self._constant(float(name == "new_ones"), node)
        if kwargs or not all(isinstance(a, (Ref, int, float)) or _is_symbol(a) for a in args):
            raise Unread(f"{name} is called in an unknown way")
        if name == "where" and len(args) == 3 and isinstance(args[0], Ref):
            return self.call(WHERE[isinstance(args[1], Ref), isinstance(args[2], Ref)], *args)
        if name in ("floordiv", "floor_divide") and len(args) == 2:
            return self._floor_divided(*args)
        found = UNARY.get(name) if len(args) == 1 else None
        if len(args) == 2:
            tensors = isinstance(args[0], Ref), isinstance(args[1], Ref)
            found = BINARY.get(name, {}).get(tensors)
        if found is None:
            raise Unread(f"{name} is not known there")
        return self.call(found, *args)

    def _floor_divided(self, value: Any, by: Any) -> Ref:
        """Inductor's C++ for ``floor_divide`` of integers gives garbage where sizes vary (2.13)."""
        if not isinstance(value, Ref) or not isinstance(by, int) or isinstance(by, bool) or not by:
            raise Unread("a division is rounded by what is no integer")
        whole = self.call(aten.sub.Tensor, value, self.call(aten.remainder.Scalar, value, by))
        return self.call(ROUNDED, whole, by, "trunc")

    def _cast(self, name: str, node: fx.Node, args: Any, kwargs: Any) -> Ref:
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or value.device != self.device:
            raise Unread("what it moves is not known")
        if not isinstance(args[0], Ref):
            raise Unread(f"{name} of no tensor")
        return self.call(aten.to.dtype, args[0], value.dtype)

    def _constant(self, value: float, node: fx.Node) -> Ref:
        given = value_of(node)
        if not isinstance(given, torch.Tensor) or given.dim() or given.device != self.device:
            raise Unread(f"{name_of(node)} is not one number")
        return self.filled(value, given.dtype)

    def filled(self, value: float, dtype: torch.dtype) -> Ref:
        """A number for every sequence."""
        like = self.call(aten.to.dtype, Ref(-INDICES), dtype)
        return self.call(aten.full_like.default, like, value)

    def _is_true(self, ref: Ref) -> bool:
        if ref.step < 0:
            return False
        step = self.steps[ref.step]
        return step.target is aten.full_like.default and step.args[1] == 1.0

    def _looked_up(self, node: fx.Node, args: Any) -> Any:
        table, at = args
        if not isinstance(table, _Table):
            raise Unread("it takes a part of what is no captured tensor")
        given = node.args[1]
        given = given if isinstance(given, (tuple, list)) else (given,)
        at = at if isinstance(at, (tuple, list)) else (at,)
        for index, source in zip(at, given, strict=True):
            value = value_of(source)
            if isinstance(index, Ref):
                if getattr(value, "dtype", None) not in (torch.int32, torch.int64):
                    raise Unread("a captured tensor is looked up at what is no number")
            elif isinstance(index, bool) or not isinstance(value, (int, torch.SymInt)):
                raise Unread("a captured tensor is looked up at more than one place")
        table = replace(table, at=(*table.at, *at))
        rank = value_of(table.node).dim()
        if len(table.at) > rank:
            raise Unread("a captured tensor has fewer dimensions")
        return table if len(table.at) < rank else self._entry(table)

    def _entry(self, table: _Table) -> Ref:
        rest: Any = table.node
        for dim in reversed(range(len(table.at))):
            if not isinstance(table.at[dim], Ref):
                rest = self.call(aten.select.int, rest, dim, table.at[dim])
        at = tuple(index for index in table.at if isinstance(index, Ref))
        if at:
            return self.call(aten.index.Tensor, rest, at)
        return self.call(aten.reshape.default, rest, ONE)


def _is_symbol(value: Any) -> bool:
    """Whether this is a captured int or float that varies."""
    return isinstance(value_of(value), (torch.SymInt, torch.SymFloat))
