"""Operators that keep a cache tensor packed: what caches, ``generate`` and beam search do to it.

Each rule takes the operator and its arguments and returns a packed result, or NotImplemented
where these arguments need the dense tensor. Cache operations in transformers' terms: append (cat),
crop (slice), reorder (index_select), select and repeat rows, offload (to).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .tensor import PACKED_OPS, PackedKV

aten = torch.ops.aten


def _keeps_packed(*ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for op in ops:
            PACKED_OPS[op] = rule
        return rule

    return register


def _rows(handle: PackedKV, rows: Tensor) -> PackedKV:
    assert handle.store is not None
    return PackedKV.of(handle.store.select(rows, handle.shape[2]))


def _all_rows(handle: PackedKV) -> Tensor:
    return torch.arange(handle.shape[0], device=handle.device)


@_keeps_packed(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _same(func: Any, x: PackedKV) -> Any:
    return PackedKV.of(x.store, x.shape[2])  # type: ignore[arg-type]


@_keeps_packed(aten.clone.default)
def _clone(func: Any, x: PackedKV, *, memory_format: Any = None) -> Any:
    assert x.store is not None
    return PackedKV.of(x.store.clone(x.shape[2]))


@_keeps_packed(aten._to_copy.default)
def _to(func: Any, x: PackedKV, **kwargs: Any) -> Any:
    assert x.store is not None
    dtype = kwargs.get("dtype") or x.dtype
    if not dtype.is_floating_point or kwargs.get("layout") not in (None, torch.strided):
        return NotImplemented
    device = kwargs.get("device") or x.device
    moved = x.store.to(x.shape[2], dtype, torch.device(device))
    return PackedKV.of(moved)


@_keeps_packed(aten.cat.default)
def _append(func: Any, tensors: list[Tensor], dim: int = 0) -> Any:
    first, *rest = [t for t in tensors if t.numel() or t.dim() > 1]
    if not isinstance(first, PackedKV) or dim not in (2, -2):
        return NotImplemented
    batch, heads, _, width = first.shape
    for new in rest:
        fits = new.dim() == 4 and (*new.shape[:2], new.shape[3]) == (batch, heads, width)
        if isinstance(new, PackedKV) or new.dtype != first.dtype or not fits:
            return NotImplemented
    grown = _same(func, first)
    for new in rest:
        grown = grown.append(new)
    return grown


@_keeps_packed(aten.slice.Tensor)
def _slice(
    func: Any, x: PackedKV, dim: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> Any:  # fmt: skip
    dim = dim % 4
    start, end, step = slice(start, end, step).indices(x.shape[dim])
    if dim == 0:
        return _rows(x, _all_rows(x)[start:end:step])
    if step != 1 or start != 0:
        return NotImplemented
    if end == x.shape[dim]:
        return _same(func, x)
    return PackedKV.of(x.store, end) if dim == 2 and end > 0 else NotImplemented  # type: ignore[arg-type]


@_keeps_packed(aten.index_select.default)
def _index_select(func: Any, x: PackedKV, dim: int, index: Tensor) -> Any:
    return _rows(x, index) if dim % 4 == 0 else NotImplemented


@_keeps_packed(aten.index.Tensor)
def _index(func: Any, x: PackedKV, indices: list[Tensor | None]) -> Any:
    if not isinstance(x, PackedKV) or any(i is not None for i in indices[1:]):
        return NotImplemented
    rows = indices[0]
    if rows is None or rows.dim() != 1:
        return NotImplemented
    if rows.dtype == torch.bool:
        rows = rows.nonzero()[:, 0]
    return _rows(x, torch.where(rows < 0, rows + x.shape[0], rows))


@_keeps_packed(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def _split(func: Any, x: PackedKV, sizes: Any, dim: int = 0) -> Any:
    if dim % 4 != 0:
        return NotImplemented
    return [_rows(x, rows) for rows in func(_all_rows(x), sizes, 0)]


@_keeps_packed(aten.repeat.default)
def _repeat(func: Any, x: PackedKV, repeats: list[int]) -> Any:
    if len(repeats) != 4 or list(repeats[1:]) != [1, 1, 1]:
        return NotImplemented
    return _rows(x, _all_rows(x).repeat(repeats[0]))


@_keeps_packed(
    # PyTorch would take this one apart (unsqueeze, expand, clone, flatten) before dispatch.
    torch.Tensor.repeat_interleave,
    torch.repeat_interleave,
    aten.repeat_interleave.self_int,
)
def _repeat_rows(
    func: Any, x: PackedKV, repeats: int, dim: int | None = None, *, output_size: Any = None
) -> Any:
    if dim is None or dim % 4 != 0 or not isinstance(repeats, int):
        return NotImplemented
    return _rows(x, _all_rows(x).repeat_interleave(repeats))
