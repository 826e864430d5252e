"""Code the oldest tokens of the rings of many caches: on a GPU by one CUDA graph for all of them.

A decode step writes its token into the ring of every layer, and every so many steps all rings are
full. By itself that would be half a dozen launches for keys and for values of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cache import SideStore
from ..cache.lease import writing
from ..codec import Layout, parse_layout
from ..locks import lock
from ..lower.capture import Captured
from ..lower.streams import Streams
from ..ops.encode_cuda import encode_kernels


@dataclass
class Count:
    """How many stores have had their ring shifted, should coding fail half-way."""

    value: int = 0


class Flush:
    """Codes oldest tokens.

    Args:
        capture: whether to make CUDA graphs.
    """

    def __init__(self, capture: bool) -> None:
        self.capture = capture
        self._calls: dict[Any, Captured] = {}
        self._shifted = Count()
        self._streams = Streams()
        self._lock = lock()  # several threads may decode

    def __call__(self, stores: Sequence[SideStore], new: Sequence[int]) -> None:
        """Let ``new`` tokens, at most a block, fit into the ring of each store."""
        full = [(s, s.surplus(n)) for s, n in zip(stores, new, strict=True) if s.surplus(n)]
        states = {(s.coded, s.recent, s.device, surplus) for s, surplus in full}
        kernels = _kernels([s for s, _ in full]) if self.capture and len(states) == 1 else None
        if kernels is None:
            for store, surplus in full:
                store.code_oldest(surplus)
        else:
            with self._lock:
                self._together([s for s, _ in full], full[0][1], kernels)

    def _together(self, stores: Sequence[SideStore], tokens: int, kernels: Any) -> None:
        start, live, device = stores[0].coded, stores[0].recent, stores[0].device
        for store in stores:
            store.make_room(start + tokens)
        inputs = [torch.full((1,), start, dtype=torch.int32, device=device)]
        counts = []
        for store in stores:
            mine = [store.tally, *store.tensors(), *store.ref.code.on(device)]
            inputs += mine
            counts.append(len(mine))
        specs = tuple(s.ref.layout.spec for s in stores)
        key = (specs, tuple(counts), tokens, live)
        if key not in self._calls:
            every = partial(
                _code_all, self._shifted, self._streams, kernels.code_oldest, specs,
                tuple(counts), tokens, live,
            )  # fmt: skip
            # All are read and written where they are, except for the place, which is copied.
            self._calls[key] = Captured(every, frozenset(range(1, len(inputs))))
        try:
            with writing(inputs, device):
                self._calls[key](inputs)
        except BaseException:
            for store in stores[: self._shifted.value]:
                store.coded = start + tokens
            raise
        for store in stores:
            store.coded = start + tokens


def _kernels(stores: Sequence[SideStore]) -> Any:
    """The module with the kernels for all of these; None if they do not apply."""
    found = None
    for store in stores:
        layout = store.ref.layout
        if layout.per_sequence or store.tally.device != store.device:
            return None
        found = encode_kernels(store.side.ring, layout)
        if found is None:
            return None
    return found


def _code_all(
    shifted: Count, streams: Streams, code_oldest: Callable[..., None], specs: Sequence[str],
    counts: Sequence[int], tokens: int, live: int, begin: Tensor, *tensors: Tensor,
) -> list[Any]:  # fmt: skip
    """What is captured: every store by itself; those whose ring is shifted are counted."""

    def pieces() -> Iterator[Callable[[], None]]:
        shifted.value = at = 0
        for spec, count in zip(specs, counts, strict=True):
            layout: Layout = parse_layout(spec)
            sums, *mine = tensors[at : at + count]
            at += count
            *payload, pool, positions, ring = mine[: len(mine) - layout.param_count]
            params = mine[len(mine) - layout.param_count :]
            yield partial(
                code_oldest, tokens, live, params, layout, payload, pool, positions, ring, sums,
                begin,
            )  # fmt: skip
            shifted.value += 1

    streams(pieces(), begin.device)
    return []
