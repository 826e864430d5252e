"""A graph being rewritten, and the contract between the new graph and the runtime.

The Dynamo graph takes and returns whole cache tensors, packed ones among them. The rewritten
graph takes and returns plain tensors only. Every input of the new graph is an entry of a table:

    table 0            the Dynamo arguments; in a fit, a mask of visual tokens behind them
    table 1            each handle's length; then, on each device that handles are on, lengths
                       before and after ([handles, 2]), and the common lengths after of those that
                       grow and of those that do not ([2])
    table 2            on each device on which the graph encodes, the tokens of the prompt by kind
                       (``kernels/kinds.py``), where codes want to know
    table 3 + i        packed input i: the store's tensors, then the parameters of its code, then
                       the importance of the tokens in its ring, if later ones have bits by it
    table 3 + H + j    parameters of code j, with which the graph encodes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..codec import parse_layout
from ..compat import FLOAT, is_python_float
from .base import output_of, value_of
from .factors import write_factors
from .find_attention import AttentionSite
from .mask import apart
from .plan import Plan
from .site_masks import SiteMasks

ARGUMENTS, LENGTHS, SORTED_TOKENS, HANDLES = 0, 1, 2, 3

BEFORE, AFTER, GROWN, STILL = 0, 1, 2, 3


@dataclass(frozen=True)
class PlainOutput:
    """Result ``value`` of the new graph, as it is."""

    value: int


@dataclass(frozen=True)
class ArgumentOutput:
    """Dynamo argument ``argument``, a packed input returned as it came."""

    argument: int


@dataclass(frozen=True)
class AppendedOutput:
    """Packed input ``handle`` with the tokens that the graph wrote into its ring."""

    handle: int


@dataclass(frozen=True)
class ExtendedOutput:
    """Packed input ``handle``, which the runtime extends by result ``value``, new tokens.

    Result ``importance`` is that of all tokens, where later ones have bits by it; else None.
    """

    handle: int
    value: int
    importance: int | None = None


@dataclass(frozen=True)
class EncodedOutput:
    """A new store from ``count`` results at ``value``, coded by code ``code``.

    The result behind them is the number of tokens.
    """

    code: int
    value: int
    count: int


@dataclass(frozen=True)
class DenseOutput:
    """Result ``value``, a dense cache tensor that the runtime packs by code ``code``."""

    code: int
    value: int


Output = (
    PlainOutput | ArgumentOutput | AppendedOutput | ExtendedOutput | EncodedOutput | DenseOutput
)


@dataclass(frozen=True)
class Interface:
    """How to call the new graph and what to make of its results.

    Attributes:
        slots: for each input, table and index.
        handles: positions of the packed inputs among the Dynamo arguments.
        appends: for each packed input, the tokens that the graph writes into its ring.
        outputs: one entry for each result of the Dynamo graph.
        extra: where results begin that are for the runtime alone.
        written: numbers of packed inputs that the graph wrote to, with the results that are their
            new content.
    """

    slots: tuple[tuple[int, int], ...]
    handles: tuple[int, ...]
    appends: tuple[int, ...]
    outputs: tuple[Output, ...]
    extra: int
    written: tuple[tuple[int, int], ...] = ()


class Draft:
    """A copy of a Dynamo graph, open for rewriting.

    Args:
        gm: the Dynamo graph; it is not changed.
        plan: its plan.
        layouts: spec of the code of each packed input.
        in_step: whether the packed inputs that grow have the same lengths, as they have unless a
            person has cut some of them, and whether those that do not grow have: what depends on
            lengths is then computed once for all layers.
    """

    def __init__(
        self, gm: fx.GraphModule, plan: Plan, layouts: tuple[str, ...],
        in_step: tuple[bool, bool] = (False, False),
    ) -> None:  # fmt: skip
        self.gm = gm
        self.plan = plan
        self.layouts = layouts
        self.in_step = in_step
        self.graph = fx.Graph()
        self.map: dict[fx.Node, fx.Node] = {}
        self._results: Any = self.graph.graph_copy(gm.graph, self.map)
        arguments = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self._slots = {self.map[n]: (ARGUMENTS, i) for i, n in enumerate(arguments)}
        for argument in arguments:
            self.map[argument].meta[FLOAT] = is_python_float(argument)
        self._by_slot: dict[tuple[int, int], fx.Node] = {}
        self._handles = tuple(arguments.index(h) for h in plan.handles)
        self.appends = [0] * len(plan.handles)
        self._devices = [value_of(h).device for h in plan.handles]
        self._where = list(dict.fromkeys(self._devices))
        self._special: dict[fx.Node, Callable[[Callable[[fx.Node], int]], Output]] = {}
        self.extra: list[fx.Node] = []
        self.written: dict[int, fx.Node] = {}
        self._masks = SiteMasks(self)

    # Inputs --------------------------------------------------------------------------------------

    def input(self, table: int, index: int) -> fx.Node:
        """The input that stands for an entry of a table."""
        slot = (table, index)
        if slot not in self._by_slot:
            last = next(reversed(self._slots), None)
            if last is None:
                place = self.graph.inserting_before(next(iter(self.graph.nodes), None))
            else:
                place = self.graph.inserting_after(last)
            with place:
                node = self.graph.placeholder(f"apack_{table}_{index}")
            self._slots[node] = slot
            self._by_slot[slot] = node
        return self._by_slot[slot]

    def number(self, handle: fx.Node | None) -> int:
        """Which packed input a placeholder of the Dynamo graph is."""
        return self.plan.handles.index(handle)

    def side(self, number: int) -> list[fx.Node]:
        """The tensors of a packed input, as ops take them."""
        layout = parse_layout(self.layouts[number])
        count = len(layout.payload_fields(torch.float32)) + 3 + layout.param_count
        return [self.input(HANDLES + number, i) for i in range(count)]

    def ring(self, number: int) -> fx.Node:
        """The ring of a packed input."""
        layout = parse_layout(self.layouts[number])
        return self.side(number)[len(layout.payload_fields(torch.float32)) + 2]

    def importance(self, number: int) -> fx.Node:
        """The importance of the tokens in the ring of a packed input."""
        return self.input(HANDLES + number, len(self.side(number)))

    def code(self, number: int, layout: str) -> list[fx.Node]:
        """The parameters of a code to encode with."""
        table = HANDLES + len(self.plan.handles) + number
        return [self.input(table, i) for i in range(parse_layout(layout).param_count)]

    def lengths(self, number: int, when: int) -> fx.Node:
        """``int64 [2]`` of a packed input, at the current insertion point."""
        still = not self.plan.appended[number]
        start = len(self._devices) + 4 * self._where.index(self._devices[number])
        if when == AFTER and self.in_step[still]:
            return self.input(LENGTHS, start + (STILL if still else GROWN))
        every = self.input(LENGTHS, start + when)
        return self.graph.call_function(torch.ops.aten.select.int, (every, 0, number))

    def device(self, number: int) -> torch.device:
        """Where a packed input is."""
        return self._devices[number]

    def length(self, number: int) -> fx.Node:
        """The logical length of a packed input, before this graph's appends."""
        return self.input(LENGTHS, number)

    # Outputs -------------------------------------------------------------------------------------

    def result(
        self, original: fx.Node, recipe: Callable[[Callable[[fx.Node], int]], Output]
    ) -> None:
        """Make the results that are ``original`` by ``recipe(number_of_result)``."""
        self._special[original] = recipe

    def replace(self, original: fx.Node, new: fx.Node) -> None:
        """Let ``new`` stand for ``original`` from now on, among the results too."""
        old = self.map[original]
        self._results = [new if r is old else r for r in self._results]
        self.map[original] = new

    def queries(self, site: AttentionSite) -> fx.Node:
        """``[B, Hq, Q, D]`` of a site with its factors, at the current insertion point."""
        q, value = self.map[site.q], value_of(site.q)
        q = q if value.dim() == 4 else apart(self.graph, q, site.heads)
        return write_factors(self.graph, q, site.factors, self.map, site.heads, value.dtype)

    def mask(self, site: AttentionSite) -> fx.Node | None:
        """The mask of a site in the new graph; if it is bool, True where a token is seen."""
        return self._masks.of(site)

    def is_live(self, node: fx.Node) -> bool:
        """Whether a node of the new graph is read by another, or is a plain result."""
        return bool(node.users) or node in self._plain_results()

    def erase_dead_sizes(self) -> None:
        """Erase sizes, and what was computed from them, that nobody reads any more.

        They would keep the tensor alive whose size they are.
        """
        results = self._plain_results()
        for node in reversed(list(self.graph.nodes)):
            if node.op.startswith("call") and not node.users and node not in results:
                value = value_of(node)
                if isinstance(value, (int, torch.SymInt, torch.Size)):
                    self.graph.erase_node(node)

    def _plain_results(self) -> set[fx.Node]:
        originals: Any = output_of(self.gm.graph).args[0]
        return {
            self.map[o]
            for o in originals
            if isinstance(o, fx.Node) and o not in self._special and o not in self.plan.handles
        }

    def finish(self) -> tuple[fx.GraphModule, Interface]:
        """The new graph module and its contract."""
        values: list[Any] = []
        numbers: dict[Any, int] = {}

        def number_of(value: Any) -> int:
            key = value if isinstance(value, fx.Node) else ("constant", len(values))
            if key not in numbers:
                numbers[key] = len(values)
                values.append(value)
            return numbers[key]

        outputs: list[Output] = []
        originals: Any = output_of(self.gm.graph).args[0]
        for original, value in zip(originals, self._results, strict=True):
            if original in self.plan.handles:
                outputs.append(ArgumentOutput(self._handles[self.number(original)]))
                continue
            recipe = self._special.get(original) if isinstance(original, fx.Node) else None
            outputs.append(recipe(number_of) if recipe else PlainOutput(number_of(value)))
        extra = len(values)
        values.extend(self.extra)
        written = tuple((number, len(values) + i) for i, number in enumerate(self.written))
        values.extend(self.written.values())
        self.graph.output(tuple(values))
        self._erase_handles()
        self.graph.lint()
        interface = Interface(
            tuple(self._slots.values()),
            self._handles,
            tuple(self.appends),
            tuple(outputs),
            extra,
            written,
        )
        return fx.GraphModule(self.gm, self.graph), interface

    def _erase_handles(self) -> None:
        for handle in self.plan.handles:
            node = self.map[handle]
            if node.users:
                raise AssertionError(f"{node} still has users: {list(node.users)}")
            self.graph.erase_node(node)
            del self._slots[node]

    def first_user(self, node: fx.Node) -> fx.Node:
        """The earliest user of ``node`` in the new graph."""
        return next(n for n in self.graph.nodes if n in node.users)
