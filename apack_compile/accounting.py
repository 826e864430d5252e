"""Bytes: what a cache takes, dense and packed, by kind; every storage once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import PackedKV, SideStore
from .codec import ExactLayout, ModalLayout
from .codec.code import CodeRef, total_bytes
from .codec.kinds import KINDS
from .kernels.pool import pooled_tokens


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache.

    Attributes:
        dense: what its tensors would take unpacked, at the cache's dtype.
        packed: what they take: the sum of the next five.
        codes: quantised coefficients, capacity slack and bases of single sequences included.
        gains: per-token scales, and levels of tokens where bits come in planes.
        exact_tokens: sinks and other tokens kept exact, with their positions.
        window: the ring of recent tokens, and what attention they receive, with tiers.
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


@dataclass(frozen=True)
class CodedPart:
    """What the option ``ratio`` is about: the coded tokens of caches, without sinks and window.

    Attributes:
        dense: bytes of 16-bit numbers that the tokens would take.
        codes: bytes of their codes, per-token gains and bases of single sequences counted, slack
            not.
        exact: bytes of 16-bit numbers of those among them that are kept exact as well.
        kept: how many of them are, in the mean over sequences and sides of layers.
    """

    dense: float
    codes: float
    exact: float
    kept: float

    @property
    def packed(self) -> float:
        """All bytes that the tokens take."""
        return self.codes + self.exact

    @property
    def ratio(self) -> float:
        """Dense over packed bytes."""
        return self.dense / self.packed

    def __str__(self) -> str:
        return (
            f"{self.ratio:.2f}x of 16-bit numbers, gains counted; {self.kept:.1f} tokens a "
            f"sequence and side kept exact as well, {self.exact / self.packed:.1%} of its bytes"
        )


def coded_part(stores: Iterable[SideStore]) -> CodedPart | None:
    """Count the coded tokens of some caches; None if there are none."""
    dense = codes = exact = 0.0
    kept = rows = 0
    for store in stores:
        batch, heads, _, dim = store.side.ring.shape
        tokens = batch * (store.coded - store.policy.sinks)
        if tokens <= 0 or store.ref.layout.kind == ExactLayout.kind:
            continue
        used = int((store.side.pool_positions >= 0).sum()) - batch * store.policy.sinks
        dense += tokens * 2 * heads * dim
        codes += tokens * _token_bytes(store) + store.ref.cache_bytes
        exact += used * 2 * heads * dim
        kept, rows = kept + used, rows + batch
    return CodedPart(dense, codes, exact, kept / rows) if rows else None


@dataclass(frozen=True)
class KindPart:
    """The coded tokens of one kind, where kinds have codes of their own.

    Attributes:
        tokens: of all sequences of a cache, in the mean over the sides of layers and over caches;
            those kept exact not.
        ratio: bytes of 16-bit numbers that such a token would take over those of its codes.
    """

    tokens: float
    ratio: float


def kind_parts(stores: Iterable[SideStore]) -> tuple[KindPart, ...]:
    """Text and visual tokens of some caches, in this order; empty: no code tells them apart."""
    coded = [s for s in stores if isinstance(s.ref.layout, ModalLayout) and s.coded]
    parts = []
    for kind in range(KINDS if coded else 0):
        tokens = dense = codes = 0.0
        for store in coded:
            layout = store.ref.layout
            assert isinstance(layout, ModalLayout)
            levels = store.side.payload[layout.tokenwise - 1][:, : store.coded, 0]
            kinds = layout.kinds_of(levels)
            tokens += int((coded_tokens(store) & (kinds == kind)).sum())
            dense += 2 * layout.heads * layout.dim
            codes += layout.token_bytes(store.dtype, kind)
        parts.append(KindPart(tokens / len(coded), dense / codes))
    return tuple(parts)


def real_tokens(store: SideStore) -> Tensor:
    """Coded tokens that are no padding: ``[B, C]`` bool.

    Without sinks nothing says where padding ends, and it counts as tokens.
    """
    positions = store.side.pool_positions  # [B, E]
    here = torch.arange(store.coded, device=positions.device)
    first = positions[:, :1] if store.policy.sinks else 0  # what is before is padding
    return (here >= first).expand(len(positions), store.coded)


def coded_tokens(store: SideStore) -> Tensor:
    """Of :func:`real_tokens` those that are not kept exact as well: ``[B, C]`` bool."""
    return real_tokens(store) & ~pooled_tokens(store.side.pool_positions, 0, store.coded)


def _token_bytes(store: SideStore) -> float:
    """Bytes of the codes of a coded token, in the mean over those that are held; slack not."""
    layout = store.ref.layout
    rows = [store.coded] * layout.tokenwise + store.rows
    sizes = (width * kind.itemsize for width, kind in layout.payload_fields(store.dtype))
    return sum(n * size for n, size in zip(rows, sizes, strict=True)) / store.coded


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
        window += 0 if store.importance is None else _storage(store.importance)
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
