"""A graph that is none of our business: exactly what stock Inductor does with it, and a count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import fx

from ..cache import PackedKV
from ..passes.find_writes import is_written
from .owners import Owners
from .stats import GraphRecord
from .visual import TokenKinds


class StockGraph:
    """Stock Inductor's artifact; packed inputs (there should be none) arrive dense."""

    def __init__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any],
        compiler: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
        record: GraphRecord,
    ) -> None:  # fmt: skip
        self.owners = Owners(record)
        self.handles = [i for i, e in enumerate(example_inputs) if isinstance(e, PackedKV)]
        self.written = written_inputs(gm.graph, self.handles)
        fakes = [e.unpack() if isinstance(e, PackedKV) else e for e in example_inputs]
        self._tokens = TokenKinds.of_copy(gm)
        self._call = compiler(gm, fakes)
        record.compiles += 1

    def __call__(self, *args: Any) -> Any:
        """What stock Inductor's artifact returns."""
        self.owners.enter(args)
        self.owners.record.ran("stock")
        if not self.handles:
            return self._tokens.run(self._call, args)
        return on_dense(partial(self._tokens.run, self._call), args, self.written)


def on_dense(
    call: Callable[[tuple[Any, ...]], Any], args: Sequence[Any], written: Sequence[int]
) -> Any:
    """Call with packed arguments made dense; those at ``written`` take their new content over."""
    dense = tuple(a.unpack() if isinstance(a, PackedKV) else a for a in args)
    result = call(dense)
    for i in written:
        args[i].replace(dense[i])
    return result


def written_inputs(graph: fx.Graph, among: Sequence[int]) -> list[int]:
    """Which inputs the graph writes to in place."""
    arguments = [n for n in graph.nodes if n.op == "placeholder"]
    return [i for i in among if is_written(arguments[i])]
