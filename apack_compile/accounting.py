"""Bytes: what a cache takes, dense and packed, by kind; every storage once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import PackedKV
from .codec.code import CodeRef, total_bytes


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache.

    Attributes:
        dense: what its tensors would take unpacked, at the cache's dtype.
        packed: what they take: the sum of the next five.
        codes: quantised coefficients, capacity slack and bases of single sequences included.
        gains: per-token scales, and levels of tokens where bits come in planes.
        exact_tokens: sinks and other tokens kept exact, with their positions.
        window: the ring of recent tokens.
        unpacked: tensors in the cache that are not packed.
        bases: parameters of the codes. They belong to the model and serve every sequence; they
            are not part of ``packed``.
    """

    dense: int
    codes: int
    gains: int
    exact_tokens: int
    window: int
    unpacked: int
    bases: int

    @property
    def packed(self) -> int:
        """All bytes that belong to this cache."""
        return self.codes + self.gains + self.exact_tokens + self.window + self.unpacked

    def __str__(self) -> str:
        ratio = self.dense / self.packed if self.packed else 1.0
        return (
            f"{_mb(self.dense)} dense, {_mb(self.packed)} packed ({ratio:.2f}x smaller): "
            f"codes {_mb(self.codes)}, gains {_mb(self.gains)}, exact tokens "
            f"{_mb(self.exact_tokens)}, window {_mb(self.window)}, not packed "
            f"{_mb(self.unpacked)}; bases, per model: {_mb(self.bases)}"
        )


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def cache_bytes(cache: Any) -> CacheBytes:
    """Count the tensors of a cache.

    Args:
        cache: a tensor, a Hugging Face ``Cache``, or any nesting of lists, tuples and dicts of
            these.
    """
    tensors = list({id(t): t for t in _tensors(cache, set())}.values())
    stores = list({id(t.store): t.store for t in tensors if isinstance(t, PackedKV)}.values())
    codes = gains = exact = window = 0
    refs: list[CodeRef] = []
    for store in stores:
        assert store is not None
        end = store.ref.layout.tokenwise
        first, *rest = store.side.payload[:end]
        codes += sum(map(_storage, (first, *store.side.payload[end:]))) + store.ref.cache_bytes
        gains += sum(map(_storage, rest))
        exact += _storage(store.side.pool) + _storage(store.side.pool_positions)
        window += _storage(store.side.ring)
        refs.append(store.ref)
    plain = [t for t in tensors if not isinstance(t, PackedKV)]
    unpacked = {t.untyped_storage().data_ptr(): _storage(t) for t in plain}
    dense = sum(t.numel() * t.dtype.itemsize for t in tensors)
    return CacheBytes(dense, codes, gains, exact, window, sum(unpacked.values()), total_bytes(refs))


def _storage(t: Tensor) -> int:
    return t.untyped_storage().nbytes()


def _tensors(value: Any, seen: set[int]) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (str, bytes, torch.nn.Module)):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        children: Iterable[Any] = value.values()
    elif isinstance(value, (Sequence, set, frozenset)):
        children = value
    else:
        children = getattr(value, "__dict__", {}).values()
    for child in children:
        yield from _tensors(child, seen)
