"""Schemas of the ``apack`` operators and what runs behind them.

Every operator has one meaning, the plain PyTorch function in ``kernels``. In eager mode that
function runs. Under AOTAutograd the operator is one node until Inductor's decompositions:

    attend   ->  score_bias (once for all layers), attend_region (compiled once for all layers);
                 on CUDA our own kernels instead, before that: attend_cuda.py
    encode   ->  encode_region; on CUDA encode_kernels, which stays one node: encode_cuda.py
    unpack   ->  its plain operations

A kernel of our own takes an operator over by a lowering, and by not registering a decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._inductor.decomposition import register_decomposition

from ..codec import parse_layout
from ..codec.layout import STRAINED, working_dtype
from ..codec.spectrum import head_groups
from ..compat import full_precision
from ..kernels.append import append_ as _append_
from ..kernels.attend import attend as _attend
from ..kernels.attend import attend_biased as _attend_biased
from ..kernels.attend_dense import attend_dense as _attend_dense
from ..kernels.attend_dense import present as _present
from ..kernels.encode import encode as _plain_encode
from ..kernels.encode import results, tallies
from ..kernels.importance import importance as _importance
from ..kernels.moments import moments as _moments
from ..kernels.planes import capacities, capacity_for, quotas
from ..kernels.planes import token_levels as _token_levels
from ..kernels.pool import make_pool as _make_pool
from ..kernels.running_importance import running_importance as _running_importance
from ..kernels.running_importance import update_importance_ as _update_importance_
from ..kernels.score_bias import score_bias as _score_bias
from ..kernels.unpack import unpack as _unpack
from ..kernels.visible import visible as _visible
from . import encode_cuda
from .attend_cuda import eager_attend, show_kernels_to_graphs
from .region import Grows, Region

_LIB = torch.library.Library("apack", "DEF")


def _define(
    schema: str,
    meaning: Callable[..., Any],
    fake: Callable[..., Any],
    inductor: Callable[..., Any] | None = None,
) -> None:
    """An operator that is one node to AOTAutograd.

    Args:
        schema: its signature.
        meaning: what it computes.
        fake: gives the shapes of its results.
        inductor: what Inductor traces in its place. None: it stays one node, and ``meaning`` runs.
            What all layers share is then computed once; and the pool's mix of scans and argmax
            does not compile everywhere (torch 2.11 on CUDA: "NYI TritonSplitDimKernel
            reductions").
    """
    name = schema.partition("(")[0]
    _LIB.define(schema)
    _LIB.impl(name, _precise(meaning), "CompositeExplicitAutograd")
    torch.library.register_fake(f"apack::{name}", fake, lib=_LIB)

    if inductor is not None:
        register_decomposition(getattr(torch.ops.apack, name).default)(inductor)


def _precise(meaning: Callable[..., Any]) -> Callable[..., Any]:
    """Codes and sums of a model under autocast are those that it has without."""

    def run(*args: Any) -> Any:
        device = next(x.device for x in pytree.arg_tree_leaves(*args) if isinstance(x, Tensor))
        with full_precision(device):
            return meaning(*args)

    return run


def _define_composite(schema: str, meaning: Callable[..., Any]) -> None:
    """An operator that every tracer sees through."""
    _LIB.define(schema)
    _LIB.impl(schema.partition("(")[0], meaning, "CompositeImplicitAutograd")


def _attend_fake(
    q: Tensor, mask: Tensor | None, k: Sequence[Tensor], v: Sequence[Tensor], lengths: Tensor,
    scale: float, k_layout: str, v_layout: str, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], parse_layout(v_layout).dim)


def _attend_for_inductor(
    q: Tensor, mask: Tensor | None, k: Sequence[Tensor], v: Sequence[Tensor], lengths: Tensor,
    scale: float, k_layout: str, v_layout: str, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return _attend(
        q, mask, k, v, lengths, scale, k_layout, v_layout, softcap, sinks,
        torch.ops.apack.attend_region.default,
    )  # fmt: skip


def _side_grows(side: Sequence[Tensor], layout: str) -> list[Grows]:
    code = parse_layout(layout)
    stored = [Grows(True, (1,), alike=True)] * code.tokenwise
    stored += [Grows(True, (1,))] * len(code.shares)
    pool = [Grows(True, (2,)), Grows(True, (1,))] if code.kept else [Grows(True)] * 2
    stored += [*pool, *[Grows(True)] * (1 + code.per_sequence)]
    return [*stored, *[Grows()] * (len(side) - len(stored))]


def _attend_grows(
    q: Tensor, bias: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], lengths: Tensor,
    scale: float, k_layout: str, v_layout: str, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> list[Grows]:  # fmt: skip
    sides = [*_side_grows(k, k_layout), *_side_grows(v, v_layout)]
    more = [] if sinks is None else [Grows()]
    return [Grows(True), Grows(True, (3,)), *sides, Grows(), *more]


def _encode_grows(
    x: Tensor, visible: Tensor | None, params: Sequence[Tensor], *settings: Any
) -> list[Grows]:
    # The importance, and tokens by kind.
    more = [Grows(True, (1,)) for x in pytree.tree_leaves(settings) if isinstance(x, Tensor)]
    seen = [] if visible is None else [Grows(True, (1,))]
    return [Grows(True, (2,)), *seen, *[Grows()] * len(params), *more]


def _encode_results(
    x: Tensor, visible: Tensor | None, params: Sequence[Tensor], layout: str, *settings: Any
) -> int:
    return results(parse_layout(layout))


def _score_bias_fake(
    mask: Tensor | None, lengths: Tensor, capacity: int, ring: int, dtype: torch.dtype
) -> Tensor:
    shape = () if mask is None else mask.shape
    sizes = [1] * (4 - len(shape)) + list(shape)
    return lengths.new_empty([*sizes[:3], capacity + ring], dtype=working_dtype(dtype))


def _encode_fake(
    x: Tensor, visible: Tensor | None, params: Sequence[Tensor], layout: str,
    sinks: int, extra: int, window: int, ring: int, chunk: int,
    importance: Tensor | None = None, kinds: Sequence[Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    batch, heads, length, dim = x.shape
    code = parse_layout(layout)
    fields = code.payload_fields(x.dtype)
    rows = [(length + chunk - 1) // chunk * chunk] * code.tokenwise
    coded = torch.sym_max(length - window, 0)
    if code.plane_kinds:
        each = [t.shape[1] for t in kinds[1:]] if kinds else [capacity_for(coded, chunk), chunk]
        rows += capacities(code, each, chunk)
    else:
        rows += [capacity_for(quota, chunk) for quota in quotas(code, coded)]
    slots = sinks + code.slots(extra, coded)
    weights = [x.new_empty(batch, ring, dtype=torch.float32)] * code.tracks_importance
    return [
        *(
            x.new_empty(batch, count, width, dtype=dtype)
            for count, (width, dtype) in zip(rows, fields, strict=True)
        ),
        x.new_empty(batch, heads, slots, dim),
        x.new_empty(batch, slots, dtype=torch.int64),
        x.new_empty(batch, heads, ring, dim),
        x.new_empty(tallies(code), dtype=torch.float32),
        *weights,
    ]


def _running_fake(before: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(before)


def _running_grows(
    before: Tensor, q: Tensor, bias: Tensor, ring: Tensor, lengths: Tensor, *rest: Any
) -> list[Grows]:
    more = [Grows() for x in rest if isinstance(x, Tensor)]
    return [*[Grows(True)] * 4, Grows(), *more]


def _make_pool_fake(
    x: Tensor, visible: Tensor | None, strain: Tensor | None, sinks: int, extra: int,
    strained: float = STRAINED,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, _, dim = x.shape
    slots = sinks + extra
    return x.new_empty(batch, heads, slots, dim), x.new_empty(batch, slots, dtype=torch.int64)


def _unpack_fake(side: Sequence[Tensor], lengths: Tensor, length: int, layout: str) -> Tensor:
    code = parse_layout(layout)
    ring = side[len(code.payload_fields(side[0].dtype)) + 2]
    return ring.new_empty(ring.shape[0], code.heads, length, code.dim)


def _moments_fake(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, visual: Tensor | None, *rest: Any
) -> list[Tensor]:
    shapes: list[tuple[int, ...]] = [()]
    for x in (k, v):
        _, heads, _, dim = x.shape
        groups = head_groups(heads, dim)
        n = heads // groups * dim
        shapes += [(heads * dim,), (groups, n, n)]
    shapes.append((k.shape[1], k.shape[3], k.shape[3]))
    kinds = 1 if visual is None else 2
    return [q.new_empty(shape, dtype=torch.float64) for shape in shapes * kinds]


_ATTEND = (
    "Tensor[] k, Tensor[] v, Tensor lengths, float scale, str k_layout, str v_layout, "
    "float softcap=0.0, Tensor? sinks=None) -> Tensor"
)
_ENCODE = (
    "(Tensor x, Tensor? visible, Tensor[] params, str layout, int sinks, int extra, int window, "
    "int ring, int chunk, Tensor? importance=None, Tensor[]? kinds=None) -> Tensor[]"
)
_RUNNING = (
    "(Tensor before, Tensor q, Tensor bias, Tensor ring, Tensor lengths, float scale, "
    "float softcap=0.0, Tensor? sinks=None)"
)

_define_composite(f"attend_biased(Tensor q, Tensor bias, {_ATTEND}", _attend_biased)
_define_composite(f"encode_plain{_ENCODE}", _plain_encode)
_define_composite(f"running_importance_plain{_RUNNING} -> Tensor", _running_importance)
_define(
    f"attend_region(Tensor q, Tensor bias, {_ATTEND}",
    Region(torch.ops.apack.attend_biased.default, _attend_grows),
    _attend_fake,
)
_define(
    f"encode_region{_ENCODE}",
    Region(torch.ops.apack.encode_plain.default, _encode_grows, _encode_results),
    _encode_fake,
)
_define(
    f"running_importance_region{_RUNNING} -> Tensor",
    Region(torch.ops.apack.running_importance_plain.default, _running_grows),
    _running_fake,
)
_define(
    f"running_importance{_RUNNING} -> Tensor",
    _running_importance,
    _running_fake,
    lambda *args: torch.ops.apack.running_importance_region(*args),
)
_define(
    f"attend(Tensor q, Tensor? mask, {_ATTEND}", eager_attend, _attend_fake, _attend_for_inductor
)
show_kernels_to_graphs(_LIB)
_define(f"encode_kernels{_ENCODE}", encode_cuda.encode, _encode_fake)
_define(f"encode{_ENCODE}", encode_cuda.encode, _encode_fake, encode_cuda.for_inductor)
_define(
    "unpack(Tensor[] side, Tensor lengths, SymInt length, str layout) -> Tensor",
    _unpack,
    _unpack_fake,
    _unpack,
)
_define(
    "moments(Tensor q, Tensor k, Tensor v, Tensor? visible, Tensor? visual, Tensor? cos, "
    "Tensor? sin, bool interleaved, int sinks) -> Tensor[]",
    _moments,
    _moments_fake,
)
_define(
    "score_bias(Tensor? mask, Tensor lengths, SymInt capacity, int ring, ScalarType dtype) "
    "-> Tensor",
    _score_bias,
    _score_bias_fake,
)
_define(
    "make_pool(Tensor x, Tensor? visible, Tensor? strain, int sinks, SymInt extra, "
    f"float strained={STRAINED}) -> (Tensor, Tensor)",
    _make_pool,
    _make_pool_fake,
)
_define(
    "token_levels(Tensor importance, int[] shares) -> Tensor",
    _token_levels,
    lambda importance, shares: torch.empty_like(importance, dtype=torch.uint8),
)
_define(
    "importance(Tensor q, Tensor k, Tensor? mask, bool causal, float scale, float softcap=0.0, "
    "Tensor? sinks=None) -> Tensor",
    _importance,
    lambda q, k, *rest: q.new_empty(q.shape[0], k.shape[2], dtype=torch.float32),
)
_define(
    "present(Tensor[] k, Tensor[] v, Tensor lengths, SymInt length, str k_layout, str v_layout) "
    "-> Tensor",
    _present,
    lambda k, v, lengths, length, *rest: k[0].new_empty(k[0].shape[0], length, dtype=torch.bool),
    _present,
)
_define_composite(
    "attend_dense(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor there, bool causal, "
    "float scale, float softcap=0.0, Tensor? sinks=None) -> Tensor",
    _attend_dense,
)
_define_composite("append_(Tensor(a!) ring, Tensor new, Tensor lengths) -> ()", _append_)
_define_composite(
    "update_importance_(Tensor(a!) importance, Tensor q, Tensor bias, Tensor ring, "
    "Tensor lengths, float scale, float softcap=0.0, Tensor? sinks=None) -> ()",
    _update_importance_,
)
_define_composite("visible(Tensor mask, SymInt batch, SymInt length) -> Tensor", _visible)
