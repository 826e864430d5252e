"""Code the oldest tokens of the rings of many caches: on a GPU by one CUDA graph for all of them.

A decode step writes its token into the ring of every layer, and every so many steps all rings are
full. By itself that would be half a dozen launches for keys and for values of each layer, and more
than a hundred where no kernels of ours code them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import SideStore
from ..cache.lease import writing
from ..codec import Layout, parse_layout
from ..kernels.encode_later import encode_oldest
from ..locks import lock
from ..lower.capture import Captured
from ..lower.streams import Streams
from ..ops.encode_cuda import encode_kernels

MOST = 4
"""Ways to flush whose graphs are kept: by codes, tokens in the rings and those to be coded."""


@dataclass
class Count:
    """How many stores have had their ring shifted, should coding fail half-way."""

    value: int = 0

    def set(self, value: int) -> None:
        """So many."""
        self.value = value


class Flush:
    """Codes oldest tokens.

    Args:
        capture: whether to make CUDA graphs.
    """

    def __init__(self, capture: bool) -> None:
        self.capture = capture
        self._calls: OrderedDict[Any, Captured] = OrderedDict()
        self._shifted = Count()
        self._streams = Streams()
        self._lock = lock()  # several threads may decode

    def __call__(self, stores: Sequence[SideStore], new: Sequence[int]) -> None:
        """Let ``new`` tokens, at most a block, fit into the ring of each store."""
        full = [(s, s.surplus(n)) for s, n in zip(stores, new, strict=True) if s.surplus(n)]
        states = {(s.coded, s.recent, s.device, surplus) for s, surplus in full}
        if self.capture and len(states) == 1 and all(_may_be_captured(s) for s, _ in full):
            with self._lock:
                self._together([s for s, _ in full], full[0][1])
        else:
            for store, surplus in full:
                store.code_oldest(surplus)

    def _together(self, stores: Sequence[SideStore], tokens: int) -> None:
        start, live, device = stores[0].coded, stores[0].recent, stores[0].device
        for store in stores:
            store.room_for_codes(start + tokens)
        inputs = [torch.full((1,), start, dtype=torch.int32, device=device)]
        counts = []
        for store in stores:
            mine = [store.tally, *store.tensors(), *store.ref.code.on(device)]
            mine += [] if store.importance is None else [store.importance]
            inputs += mine
            counts.append(len(mine))
        coders = tuple(map(_coder, stores))
        key = (coders, tuple(counts), tokens, live)
        if key not in self._calls:
            every = partial(
                _code_all, self._shifted, self._streams, coders, tuple(counts), tokens, live
            )
            # All are read and written where they are, except for the place, which is copied.
            fixed = frozenset(range(1, len(inputs)))
            # Payloads grow every few flushes, and a capture costs no more than a run without.
            self._calls[key] = Captured(
                every, fixed, sparing=False, launched=partial(self._shifted.set, len(stores))
            )
            if len(self._calls) > MOST:
                self._calls.popitem(last=False)
        self._calls.move_to_end(key)
        self._shifted.set(0)
        try:
            with writing(inputs, device):
                self._calls[key](inputs)
        except BaseException:
            for store in stores[: self._shifted.value]:
                store.coded_to(start + tokens)
            raise
        for store in stores:
            store.coded_to(start + tokens)


class Coder(NamedTuple):
    """How the ring of a store is coded.

    Attributes:
        spec: of the code.
        sinks, extra: of the pool.
        kernels: the module with kernels that do it; None: plain operators.
    """

    spec: str
    sinks: int
    extra: int
    kernels: Any


def _may_be_captured(store: SideStore) -> bool:
    """Whether coding changes nothing but the tensors of the store."""
    return not store.ref.layout.per_sequence and store.tally.device == store.device


def _coder(store: SideStore) -> Coder:
    layout, policy = store.ref.layout, store.policy
    kernels = encode_kernels(store.side.ring, layout)
    return Coder(layout.spec, policy.sinks, policy.extra, kernels)


def _code_all(
    shifted: Count, streams: Streams, coders: Sequence[Coder], counts: Sequence[int], tokens: int,
    live: int, begin: Tensor, *tensors: Tensor,
) -> list[Any]:  # fmt: skip
    """What is captured: every store by itself; those whose ring is shifted are counted.

    A capture shifts none, although it comes by here.
    """
    shifts = int(not _capturing(begin))

    def pieces() -> Iterator[Callable[[], None]]:
        at = 0
        for coder, count in zip(coders, counts, strict=True):
            layout: Layout = parse_layout(coder.spec)
            sums, *mine = tensors[at : at + count]
            at += count
            stored = len(layout.payload_fields(torch.float32)) + 3
            *payload, pool, positions, ring = mine[:stored]
            params, rest = mine[stored:][: layout.param_count], mine[stored + layout.param_count :]
            args = params, layout, payload, pool, positions, ring, sums, begin
            more = coder.sinks, coder.extra, rest[0] if rest else None, coder.kernels
            yield partial(encode_oldest, tokens, live, *args, *more)
            shifted.value += shifts

    streams(pieces(), begin.device)
    return []


def _capturing(x: Tensor) -> bool:
    """Whether operators are recorded instead of run."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
