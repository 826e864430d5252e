"""What the inputs of a rewritten graph are: which of their sizes are symbols, and the lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import DimDynamic

from ..cache import PackedKV
from ..codec import parse_layout
from ..lower.values import symbols
from ..passes.base import settled, value_of
from ..passes.draft import ARGUMENTS, HANDLES, LENGTHS, SORTED_TOKENS
from ..passes.rewrite_encode import SORTED
from .specialise import Dynamic

STATIC, DYNAMIC, SHARED = DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.DUCK


class Dynamics:
    """Which sizes of an input are symbols.

    A Dynamo argument has the symbols that Dynamo gave it. Of a store, the batch is a symbol if the
    handle's is, and the capacity of the payload always; those two are each one symbol for all
    stores that grow (K and V of all layers grow together). The capacity of a store that is read as
    it is has a symbol of its own: it may happen to be that of the others, and not for long. So has
    the number of tokens of each kind.

    Args:
        graph: the Dynamo graph.
        handles: its packed inputs.
        fixed: whether each is read as it is.
        prompt: sequences and tokens of the prompt that it encodes, if any.
    """

    def __init__(
        self, graph: fx.Graph, handles: Sequence[fx.Node], fixed: Sequence[bool],
        prompt: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        examples = [value_of(n) for n in graph.nodes if n.op == "placeholder"]
        self._arguments = [_of_example(example) for example in examples]
        self._loose = [_loose_of_example(example) for example in examples]
        self._batches = [
            SHARED if isinstance(value_of(h).shape[0], torch.SymInt) else STATIC for h in handles
        ]
        self._capacities = [DYNAMIC if alone else SHARED for alone in fixed]
        self._prompt = tuple(_of_size(size) for size in prompt)

    def of(self, slot: tuple[int, int], value: Any, layouts: Sequence[str]) -> Dynamic:
        """The dynamic dimensions of the input at ``slot``."""
        table, index = slot
        if table == ARGUMENTS:
            return self._arguments[index]
        if table == LENGTHS:
            return (DYNAMIC,) if isinstance(value, int) else None
        if table == SORTED_TOKENS:  # of each token; then the tokens of each kind
            return (self._prompt[0], self._prompt[1] if index % SORTED == 0 else DYNAMIC)
        number = table - HANDLES
        if number >= len(layouts) or not isinstance(value, Tensor):
            return None
        layout = parse_layout(layouts[number])
        payloads = len(layout.payload_fields(torch.float32))
        if index == payloads + 3 + layout.param_count:  # importance of the tokens in the ring
            return (self._batches[number], STATIC)
        if index > payloads + 3 or (index == payloads + 3 and not layout.per_sequence):
            return None  # parameters of the code that belong to the model
        rest = [STATIC] * (value.dim() - 1)
        if index < payloads:
            alike = index < layout.tokenwise  # planes are of any size
            rest[0] = self._capacities[number] if alike else DYNAMIC
        elif layout.kept and index < payloads + 2:
            rest[payloads - index + 1] = DYNAMIC  # slots of the pool, and of its positions
        return (self._batches[number], *rest)

    def loose(self, slot: tuple[int, int]) -> tuple[int, ...]:
        """The dimensions of the input at ``slot`` whose strides are symbols of their own.

        A column of a mask that grows has the same sizes at each step, and other strides.
        """
        table, index = slot
        return self._loose[index] if table == ARGUMENTS else ()


class Sizes:
    """Values of the symbols of a Dynamo graph, read off the arguments of a call."""

    def __init__(self, graph: fx.Graph) -> None:
        self._where: dict[Any, tuple[int, int | None]] = {}
        placeholders = (n for n in graph.nodes if n.op == "placeholder")
        for index, node in enumerate(placeholders):
            example = value_of(node)
            sizes = example.shape if isinstance(example, Tensor) else (example,)
            for dim, size in enumerate(sizes):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    place = dim if isinstance(example, Tensor) else None
                    self._where.setdefault(size.node.expr, (index, place))

    def value(self, size: Any, args: Sequence[Any]) -> int:
        """What ``size`` is in the call with ``args``."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        values = {}
        for symbol in size.node.expr.free_symbols:
            index, dim = self._where[symbol]
            values[symbol] = args[index] if dim is None else args[index].shape[dim]
        return int(size.node.expr.subs(values))


def _of_example(example: Any) -> Dynamic:
    if isinstance(settled(example), torch.SymInt):
        return (DYNAMIC,)
    if not isinstance(example, Tensor) or isinstance(example, PackedKV):
        return None
    dims = tuple(map(_of_size, example.shape))
    return dims if DYNAMIC in dims else None


def _of_size(size: Any) -> DimDynamic:
    return DYNAMIC if isinstance(settled(size), torch.SymInt) else STATIC


def _loose_of_example(example: Any) -> tuple[int, ...]:
    """Dimensions whose strides are symbols that no size of the tensor speaks of."""
    if not isinstance(example, Tensor) or isinstance(example, PackedKV):
        return ()
    own = symbols(tuple(example.shape))
    return tuple(i for i, step in enumerate(example.stride()) if not symbols(step) <= own)


def lengths_of(handles: Sequence[PackedKV], appends: Sequence[int]) -> list[Any]:
    """Table 1: each handle's length; on each device, lengths before and after, those in common.

    Layers of a model may be on several devices: each reads lengths on its own.
    """
    before, after = [], []
    for handle, tokens in zip(handles, appends, strict=True):
        assert handle.store is not None
        before.append((handle.store.coded, handle.store.recent))
        after.append((handle.store.coded, handle.store.recent + tokens))
    table: list[Any] = [handle.length for handle in handles]
    if not handles:
        return table
    devices = dict.fromkeys(h.store.device for h in handles)  # type: ignore[union-attr]
    pinned = any(device.type == "cuda" for device in devices)
    given = torch.tensor([*before, *after], pin_memory=pinned)  # [2 * handles, 2]
    last = {tokens > 0: len(handles) + i for i, tokens in enumerate(appends)}
    for device in devices:
        rows = given.to(device, non_blocking=True)  # from pageable memory the host would wait
        common = [rows[last[grown]] if grown in last else None for grown in (True, False)]
        table += [rows[: len(handles)], rows[len(handles) :], *common]
    return table


def in_step(handles: Sequence[PackedKV], appends: Sequence[int]) -> tuple[bool, bool]:
    """Whether the packed inputs that grow have the same lengths and grow alike; the others.

    With rings of one size: what is computed of lengths is by slot of the ring.
    """
    states: dict[bool, set[Any]] = {True: set(), False: set()}
    for handle, tokens in zip(handles, appends, strict=True):
        store = handle.store
        assert store is not None
        states[tokens > 0].add((store.coded, store.recent, store.policy.ring, tokens))
    return len(states[True]) <= 1, len(states[False]) <= 1
