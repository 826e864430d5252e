"""Schemas of the ``apack`` operators and what runs behind them.

Every operator has one meaning, the plain PyTorch function in ``kernels``. In eager mode that
function runs. Under Inductor on a CPU it is traced into, so that Inductor fuses it; on other
devices the operator stays one node, which a lowering may turn into a kernel of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import register_decomposition

from ..codec import parse_layout
from ..kernels.append import append_ as _append_
from ..kernels.attend import attend as _attend
from ..kernels.encode import encode as _encode
from ..kernels.moments import moments as _moments
from ..kernels.unpack import unpack as _unpack
from ..kernels.visible import visible as _visible

_LIB = torch.library.Library("apack", "DEF")


def _define(schema: str, meaning: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An operator that is opaque to tracing; ``fake`` gives its output shapes."""
    name = schema.partition("(")[0]
    _LIB.define(schema)
    _LIB.impl(name, meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"apack::{name}", fake, lib=_LIB)

    def decompose(*args: Any) -> Any:
        tensor = next(a for a in args if isinstance(a, Tensor) or isinstance(a, (list, tuple)))
        tensor = tensor if isinstance(tensor, Tensor) else tensor[0]
        return meaning(*args) if tensor.device.type == "cpu" else NotImplemented

    register_decomposition(getattr(torch.ops.apack, name).default)(decompose)


def _define_composite(schema: str, meaning: Callable[..., Any]) -> None:
    """An operator that every tracer sees through."""
    _LIB.define(schema)
    _LIB.impl(schema.partition("(")[0], meaning, "CompositeImplicitAutograd")


def _attend_fake(
    q: Tensor, mask: Tensor | None, k: Sequence[Tensor], v: Sequence[Tensor], lengths: Tensor,
    scale: float, k_layout: str, v_layout: str,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], parse_layout(v_layout).dim)


def _encode_fake(
    x: Tensor, visible: Tensor | None, params: Sequence[Tensor], layout: str,
    sinks: int, extra: int, window: int, ring: int, chunk: int,
) -> list[Tensor]:  # fmt: skip
    batch, heads, length, dim = x.shape
    capacity = (length + chunk - 1) // chunk * chunk
    return [
        *(
            x.new_empty(batch, capacity, width, dtype=dtype)
            for width, dtype in parse_layout(layout).payload_fields(x.dtype)
        ),
        x.new_empty(batch, heads, sinks + extra, dim),
        x.new_empty(batch, sinks + extra, dtype=torch.int64),
        x.new_empty(batch, heads, ring, dim),
    ]


def _unpack_fake(side: Sequence[Tensor], lengths: Tensor, length: int, layout: str) -> Tensor:
    code = parse_layout(layout)
    ring = side[len(code.payload_fields(side[0].dtype)) + 2]
    return ring.new_empty(ring.shape[0], code.heads, length, code.dim)


def _moments_fake(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> list[Tensor]:
    n_k, n_v, heads, dim = k.shape[1] * k.shape[3], v.shape[1] * v.shape[3], k.shape[1], k.shape[3]
    shapes = [(n_k,), (n_k, n_k), (n_v,), (n_v, n_v), (heads, dim, dim)]
    return [q.new_empty((), dtype=torch.float64)] + [
        q.new_empty(shape, dtype=torch.float32) for shape in shapes
    ]


_define(
    "attend(Tensor q, Tensor? mask, Tensor[] k, Tensor[] v, Tensor lengths, float scale, "
    "str k_layout, str v_layout) -> Tensor",
    _attend,
    _attend_fake,
)
_define(
    "encode(Tensor x, Tensor? visible, Tensor[] params, str layout, int sinks, int extra, "
    "int window, int ring, int chunk) -> Tensor[]",
    _encode,
    _encode_fake,
)
_define(
    "unpack(Tensor[] side, Tensor lengths, SymInt length, str layout) -> Tensor",
    _unpack,
    _unpack_fake,
)
_define("moments(Tensor q, Tensor k, Tensor v, Tensor? visible) -> Tensor[]", _moments, _moments_fake)
_define_composite("append_(Tensor(a!) ring, Tensor new, Tensor lengths) -> ()", _append_)
_define_composite("visible(Tensor mask, SymInt batch, SymInt length) -> Tensor", _visible)
