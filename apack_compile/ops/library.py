"""Schemas of the ``apack`` operators and what runs behind them.

Every operator has one meaning, the plain PyTorch function in ``kernels``. In eager mode that
function runs. Under AOTAutograd the operator is one node until Inductor's decompositions, which
trace into the function so that Inductor fuses it. A kernel of our own takes an operator over by a
decomposition that returns NotImplemented for its device, and a lowering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import register_decomposition

from ..codec import parse_layout
from ..codec.layout import working_dtype
from ..kernels.append import append_ as _append_
from ..kernels.attend import attend as _attend
from ..kernels.encode import encode as _encode
from ..kernels.moments import moments as _moments
from ..kernels.pool import make_pool as _make_pool
from ..kernels.score_bias import score_bias as _score_bias
from ..kernels.unpack import unpack as _unpack
from ..kernels.visible import visible as _visible

_LIB = torch.library.Library("apack", "DEF")


def _define(
    schema: str, meaning: Callable[..., Any], fake: Callable[..., Any], opaque: bool = False
) -> None:
    """An operator that is one node to AOTAutograd; ``fake`` gives its output shapes.

    Inductor traces into it, unless it is ``opaque``: what all layers share is computed once, not
    fused into each of them; and the pool's mix of scans and argmax does not compile on every
    version of torch (2.11 on CUDA: "NYI TritonSplitDimKernel reductions").
    """
    name = schema.partition("(")[0]
    _LIB.define(schema)
    _LIB.impl(name, meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"apack::{name}", fake, lib=_LIB)

    if not opaque:
        register_decomposition(getattr(torch.ops.apack, name).default)(meaning)


def _define_composite(schema: str, meaning: Callable[..., Any]) -> None:
    """An operator that every tracer sees through."""
    _LIB.define(schema)
    _LIB.impl(schema.partition("(")[0], meaning, "CompositeImplicitAutograd")


def _attend_fake(
    q: Tensor, mask: Tensor | None, k: Sequence[Tensor], v: Sequence[Tensor], lengths: Tensor,
    scale: float, k_layout: str, v_layout: str,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], parse_layout(v_layout).dim)


def _score_bias_fake(
    mask: Tensor | None, lengths: Tensor, capacity: int, ring: int, dtype: torch.dtype
) -> Tensor:
    shape = () if mask is None else mask.shape
    sizes = [1] * (4 - len(shape)) + list(shape)
    return lengths.new_empty([*sizes[:3], capacity + ring], dtype=working_dtype(dtype))


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


def _make_pool_fake(
    x: Tensor, visible: Tensor | None, sinks: int, extra: int
) -> tuple[Tensor, Tensor]:
    batch, heads, _, dim = x.shape
    slots = sinks + extra
    return x.new_empty(batch, heads, slots, dim), x.new_empty(batch, slots, dtype=torch.int64)


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
_define(
    "moments(Tensor q, Tensor k, Tensor v, Tensor? visible) -> Tensor[]", _moments, _moments_fake
)
_define(
    "score_bias(Tensor? mask, Tensor lengths, SymInt capacity, int ring, ScalarType dtype) -> Tensor",
    _score_bias,
    _score_bias_fake,
    opaque=True,
)
_define(
    "make_pool(Tensor x, Tensor? visible, int sinks, int extra) -> (Tensor, Tensor)",
    _make_pool,
    _make_pool_fake,
    opaque=True,
)
_define_composite("append_(Tensor(a!) ring, Tensor new, Tensor lengths) -> ()", _append_)
_define_composite("visible(Tensor mask, SymInt batch, SymInt length) -> Tensor", _visible)
