"""Packed attention by the Triton kernels: fold, attend, merge."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton
from triton.runtime import JITFunction

from ...codec import Layout, parse_layout
from ..side import Side
from .attend import attend_kernel
from .fold import fold_kernel
from .merge import merge_kernel
from .plan import (
    EXACT_ROWS,
    MERGE,
    MOST_SPLITS,
    MOST_STACKED,
    Config,
    Plan,
    default_config,
    make_plan,
    merge_slots,
    shared_bytes,
    supported,
)
from .turned import basis_kernel

LOG2_E = 1.4426950408889634

DTYPES = (torch.float16, torch.bfloat16)

INTERPRETED = not isinstance(attend_kernel, JITFunction)
"""Whether Triton interprets the kernels (TRITON_INTERPRET=1), on whatever device."""


def takes(q: Tensor, k_layout: str, v_layout: str) -> bool:
    """Whether the kernels can attend with these queries and codes."""
    key, value = parse_layout(k_layout), parse_layout(v_layout)
    known = supported(key) and supported(value) and not value.positional
    fits = not key.positional or shared_bytes(key) <= shared_memory(q.device)
    return known and fits and q.dtype in DTYPES


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a few for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have on a CUDA device; those of an H100 for the interpreter."""
    if device.type != "cuda":
        return 227 << 10
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def programs_apart(batch: int, plan: Plan, device: torch.device) -> int:
    """Programs for ring and pool of a head: two where multiprocessors have nothing else to do."""
    few = multiprocessors(device) // 4
    return plan.exacts if isinstance(batch, int) and batch * plan.exact_programs <= few else 1


def count_splits(
    batch: int, capacity: int, plan: Plan, config: Config, device: torch.device
) -> int:
    """Splits over tokens so that all programs over codes run at once. Sizes may be symbols."""
    programs = batch * plan.groups * plan.blocks
    slots = multiprocessors(device) * config.fill
    rest = torch.sym_max(slots - batch * plan.exact_programs, int(slots * config.share))
    room = rest // programs
    tiles = (capacity + config.tokens - 1) // config.tokens
    return torch.sym_max(torch.sym_min(torch.sym_min(room, tiles), MOST_SPLITS), 1)


def _kernel(kernel: Any) -> Any:
    return kernel if INTERPRETED else wrap_triton(kernel)


def _parts(side: Side) -> tuple[Tensor, Tensor]:
    """Codes and gains (the codes again where there are none)."""
    return side.payload[0].contiguous(), side.payload[-1].contiguous()


def _turning(side: Side, layout: Layout, plan: Plan) -> list[Tensor]:
    """Basis, offsets, spans and waves of keys that are turned; stand-ins of others."""
    if not layout.positional:
        return [side.ring] * 4
    mean, _, synthesis, units = side.params[:4]
    spans, waves = (t.contiguous() for t in side.params[-2:])
    channels, width = 2 * plan.basis["HALF"], plan.basis["KW"]
    basis = mean.new_empty(layout.heads, channels, width, dtype=torch.float16)
    offsets = mean.new_empty(layout.heads, 2, channels)
    _kernel(basis_kernel)[(layout.heads * plan.basis["PARTS"],)](
        mean, synthesis, units, spans, basis, offsets, **plan.basis, num_warps=4
    )
    return [basis, offsets, spans, waves]


def attend_packed(
    q: Tensor, bias: Tensor | None, k: Sequence[Tensor], v: Sequence[Tensor], lengths: Tensor,
    scale: float, k_layout: str, v_layout: str, softcap: float = 0.0,
    sinks: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """:func:`~apack_compile.kernels.attend.attend_biased`, by kernels.

    Args:
        q: queries ``[B, Hq, Q, D]``, float16 or bfloat16.
        bias: of ``apack::score_bias``, or None where there is no mask.
        k, v, lengths, scale, k_layout, v_layout, softcap, sinks: as there.
        config: how to cut the work; None: :func:`default_config`.
    """
    key, value = parse_layout(k_layout), parse_layout(v_layout)
    keys, values = Side.of(k, key), Side.of(v, value)
    batch, q_heads, queries = q.shape[0], int(q.shape[1]), int(q.shape[2])
    if config is None:
        config = default_config(k_layout, v_layout, q_heads * queries)
    capacity, ring = keys.capacity, keys.ring.shape[2]
    pools = keys.pool.shape[2], values.pool.shape[2]
    plan = make_plan(k_layout, v_layout, q_heads, queries, pools, ring, config)
    splits = count_splits(batch, capacity, plan, config, q.device)
    q, k_ring, v_ring = q.contiguous(), keys.ring.contiguous(), values.ring.contiguous()
    k_pool, v_pool = keys.pool.contiguous(), values.pool.contiguous()
    k_codes, k_gain = _parts(keys)
    v_codes, v_gain = _parts(values)
    factor = scale * LOG2_E

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    apart = programs_apart(batch, plan, q.device)
    exact_programs = batch * plan.exact_programs * apart
    head_blocks = plan.attend["H"] * ((batch * plan.head_rows + EXACT_ROWS - 1) // EXACT_ROWS)
    q16, shift, centre, table = q, lengths, lengths, lengths
    if keys.params and not key.positional:
        table = empty(MOST_STACKED, dtype=torch.int32)
        q16 = empty(batch, plan.groups, plan.rows, plan.attend["KW"], dtype=torch.float16)
        shift = empty(batch, plan.groups, plan.rows)
        centre = empty(batch, plan.groups, plan.fold["CHUNKS"], plan.rows)
        _kernel(fold_kernel)[(head_blocks * plan.fold["CHUNKS"],)](
            q, keys.params[0], *keys.params[2:4], q16, shift, centre, table, factor, batch,
            **plan.fold, STEPS=MOST_STACKED, num_warps=4,
        )  # fmt: skip
    elif values.params:
        table = torch.arange(MOST_STACKED, dtype=torch.int32, device=q.device)
    part = empty(batch, plan.groups, splits + plan.exacts, plan.rows, plan.attend["VW"])
    stats = empty(batch, plan.groups, splits + plan.exacts, 4, plan.rows)
    exact = empty(batch, q_heads, queries, plan.exacts, value.dim)
    bias = None if bias is None else bias.contiguous()
    strides, kind = _bias_strides(bias)
    whole = int(capacity % config.tokens == 0)
    limit = {"maxnreg": config.registers} if config.registers else {}
    _kernel(attend_kernel)[(exact_programs + batch * plan.groups * plan.blocks * splits,)](
        q16, shift, centre, table, q, k_codes, k_gain, v_codes, v_gain,
        lengths if bias is None else bias, lengths,
        keys.pool_positions.contiguous(), values.pool_positions.contiguous(),
        *_turning(keys, key, plan), k_pool, v_pool, k_ring, v_ring, part, stats, exact,
        splits, apart, exact_programs, capacity, *strides, factor,
        **plan.attend, BIAS=kind, CAP=softcap, WHOLE=whole, ASM=not INTERPRETED,
        num_warps=config.warps, **limit,
    )  # fmt: skip
    out = empty(batch, q_heads, queries, value.dim, dtype=q.dtype)
    mean, synthesis, units = part, part, part
    if values.params:
        mean, _, synthesis, units = values.params[:4]
    processors = multiprocessors(q.device)
    rows, parts = batch * key.heads * plan.head_rows, plan.merge["PARTS"]
    programs = processors * MERGE.fill // parts
    each = torch.sym_max((rows + programs - 1) // programs, 1)
    _kernel(merge_kernel)[((rows + each - 1) // each * parts,)](
        part, stats, exact, lengths if sinks is None else sinks.contiguous(),
        mean, synthesis, units, out, splits, batch, each, **plan.merge,
        SINKS=int(sinks is not None), SLOTS=merge_slots(plan, config, processors),
        num_warps=MERGE.warps,
    )  # fmt: skip
    return out


def _bias_strides(bias: Tensor | None) -> tuple[tuple[int, int, int], int]:
    """Strides by batch, head and query, 0 where it is broadcast, and the kernel's BIAS."""
    if bias is None:
        return (0, 0, 0), 0
    b, h, q = (0 if size == 1 else bias.stride(i) for i, size in enumerate(bias.shape[:3]))
    return (b, h, q), 1 if bias.shape[1] == bias.shape[2] == 1 else 2
