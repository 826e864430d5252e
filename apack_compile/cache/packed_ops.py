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

from .tensor import PACKED_OPS, PackedKV, on_dense

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
    fits = isinstance(first, PackedKV) and dim in (2, -2) and not any(
        isinstance(t, PackedKV) or t.dtype != first.dtype or t.dim() != 4 for t in rest
    )
    if not fits:
        return NotImplemented
    assert isinstance(first, PackedKV)
    for new in rest:
        first = first.append(new)
    return first


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


@_keeps_packed(aten.repeat_interleave.self_int)
def _repeat_rows(
    func: Any, x: PackedKV, repeats: int, dim: int | None = None, *, output_size: Any = None
) -> Any:
    if dim is None or dim % 4 != 0:
        return NotImplemented
    return _rows(x, _all_rows(x).repeat_interleave(repeats))


@_keeps_packed(aten.unsqueeze.default)
def _unsqueeze(func: Any, x: PackedKV, dim: int) -> Any:
    # The first step of repeat_interleave(n, dim=0), which PyTorch takes apart before us.
    return RowRepeat(x, 1) if dim == 1 else NotImplemented


class RowRepeat(torch.Tensor):
    """``x.unsqueeze(1).expand(-1, repeats, ...)`` of a handle, not computed.

    PyTorch turns ``repeat_interleave(n, dim=0)`` into unsqueeze, expand, clone, flatten. This
    carries the handle through; any other operator gets the dense tensor.
    """

    @staticmethod
    def __new__(cls, source: PackedKV, repeats: int) -> RowRepeat:
        batch, *rest = source.shape
        return torch.Tensor._make_wrapper_subclass(
            cls, (batch, repeats, *rest), dtype=source.dtype, device=source.device
        )

    def __init__(self, source: PackedKV, repeats: int) -> None:
        self.source = source
        self.repeats = repeats

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"RowRepeat({self.source!r}, {self.repeats})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        x = args[0]
        if isinstance(x, RowRepeat):
            batch, heads, length, dim = x.source.shape
            if func is aten.expand.default and x.repeats == 1:
                size = [old if new == -1 else new for new, old in zip(args[1], x.shape, strict=False)]
                if len(size) == 5 and size[0] == batch and size[2:] == [heads, length, dim]:
                    return RowRepeat(x.source, size[1])
            if func in (aten.clone.default, aten.detach.default):
                return x
            views = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
            if func in views and list(args[1]) == [batch * x.repeats, heads, length, dim]:
                return _rows(x.source, _all_rows(x.source).repeat_interleave(x.repeats))

        def dense(r: RowRepeat) -> Tensor:
            return r.source.unpack().unsqueeze(1).expand(r.shape)

        args, kwargs = torch.utils._pytree.tree_map_only(RowRepeat, dense, (args, kwargs or {}))
        return on_dense(func, args, kwargs)
