"""Packed attention by the Triton kernels: fold, attend, merge.

Where the rows of codes are not those of the tokens (dropped tokens, codes by kind), or where a
share of the tokens stays exact, rows are ranked and listed before, and pools are read by kernels of
their own; tiers are spread before. Two codes by kind are attended one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ...codec import parse_layout
from ..side import Side
from .attend import attend_kernel
from .calls import INTERPRETED, kernel
from .coded import (
    MOST_PLANES,
    Coded,
    coded,
    member_ranks,
    pairs,
    rank_planes,
)
from .fold import fold_kernel
from .launch_list import Listed, list_rows
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
from .rows import MOST_TAILS, SLOTS_AT_ONCE, TAIL_TILES, is_listed
from .slots import value_slots_kernel
from .step import Step
from .turned import basis_kernel

LOG2_E = 1.4426950408889634

DTYPES = (torch.float16, torch.bfloat16)


def takes(q: Tensor, k_layout: str, v_layout: str) -> bool:
    """Whether the kernels can attend with these queries and codes."""
    key, value = parse_layout(k_layout), parse_layout(v_layout)
    known = supported(key) and supported(value) and not value.positional
    known &= bool(key.plane_kinds) == bool(value.plane_kinds)
    every = pairs(key, value)
    known &= all(not k.tier_shares and len(v.tier_shares) <= MOST_PLANES for k, v in every)
    if not known or q.dtype not in DTYPES:
        return False
    wanted = max(shared_bytes(k.plain) for k, _ in every)
    return wanted == 0 or wanted <= shared_memory(q.device)


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


def tiles_of(capacity: int, config: Config) -> int:
    """Tiles of so many tokens."""
    return (capacity + config.tokens - 1) // config.tokens


def programs_apart(batch: int, plan: Plan, device: torch.device) -> int:
    """Programs for ring and pool of a head: two where multiprocessors have nothing else to do."""
    few = multiprocessors(device) // 4
    return 1 + plan.pool if isinstance(batch, int) and batch * plan.exact_programs <= few else 1


def exact_beside(
    batch: int, capacity: int, plan: Plan, config: Config, device: torch.device
) -> int:
    """1 if programs over codes do ring and pool as well, for they have many tiles; else 0.

    Sizes may be symbols.
    """
    if not config.beside:
        return 0
    tiles = batch * plan.groups * plan.blocks * tiles_of(capacity, config)
    slots = multiprocessors(device) * config.fill
    return torch.sym_min(tiles // (slots * config.beside), 1)


def count_splits(
    batch: int, capacity: int, plan: Plan, config: Config, device: torch.device, tails: int = 0
) -> int:
    """Splits over tokens so that all programs over codes run at once. Sizes may be symbols.

    tails: programs over slots beside them.
    """
    programs = batch * plan.groups * plan.blocks
    slots = multiprocessors(device) * config.fill
    own = 1 - exact_beside(batch, capacity, plan, config, device)
    exact = torch.sym_min(batch * plan.exact_programs, slots - int(slots * config.share))
    room = (slots - own * exact) // programs - tails
    tiles = tiles_of(capacity, config)
    return torch.sym_max(torch.sym_min(torch.sym_min(room, tiles), MOST_SPLITS), 1)


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
    if isinstance(q.shape[0], int) and not q.shape[0]:  # a selection of no sequences
        return q.new_empty(*q.shape[:3], value.dim)
    keys, values = _contiguous(Side.of(k, key)), _contiguous(Side.of(v, value))
    sizes = keys.capacity, values.capacity
    if all(isinstance(n, int) for n in sizes) and sizes[0] != sizes[1]:
        raise ValueError(f"capacities of keys and values are {sizes}: accepted are equal ones")
    bias = None if bias is None else bias.contiguous()
    factor = scale * LOG2_E
    step = Step(q.contiguous(), bias, keys, values, lengths, factor, softcap, config)
    k_ranks, v_ranks = rank_planes(keys, values, key, value, lengths)
    listed = is_listed(key, value)
    found = []
    every = pairs(key, value)
    for kind, codes in enumerate(every):
        of_keys, of_values = coded(keys, key, k_ranks, kind), coded(values, value, v_ranks, kind)
        rows = None
        if listed:
            members = member_ranks(key, k_ranks), member_ranks(value, v_ranks)
            drops = any(code.evicts for code in codes)
            rows = list_rows(step, of_keys, *members, kind, drops)
        if kind:  # ring and sinks belong to the first
            step = step._replace(lengths=torch.cat([lengths[:1], lengths.new_zeros(1)]))
        own_sinks = None if kind else sinks
        found.append(_attend(step, of_keys, of_values, rows, own_sinks, len(every) > 1))
    if len(found) == 1:
        return found[0][0]
    return _together(found).to(q.dtype)


def _contiguous(side: Side) -> Side:
    pool, positions, ring = (t.contiguous() for t in side[1:4])
    return side._replace(pool=pool, pool_positions=positions, ring=ring)


def _together(found: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Attention over all tokens from that over some, and the log2 of their masses."""
    outs = torch.stack([out for out, _ in found])
    masses = torch.stack([mass for _, mass in found if mass is not None])[..., None]
    top = masses.amax(0)
    weights = torch.exp2(masses - torch.where(top == float("-inf"), 0.0, top))
    total = weights.sum(0)
    return (weights * outs).sum(0) / torch.where(total == 0, 1.0, total)


def _attend(
    step: Step, of_keys: Coded, of_values: Coded, rows: Listed | None, sinks: Tensor | None,
    with_mass: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention over one pair of codes, pools and ring.

    Args:
        step: what is asked for.
        of_keys, of_values: the codes.
        rows: which of their rows belong together; None: rows are tokens.
        sinks: of the heads.
        with_mass: also give log2 of the mass of each row, ``[B, Hq, Q]``, and all in float32.
    """
    q, keys, values, lengths = step.q, step.keys, step.values, step.lengths
    key, value = of_keys.layout, of_values.layout
    batch, q_heads, queries = q.shape[0], int(q.shape[1]), int(q.shape[2])
    listed = rows is not None
    config = step.config or default_config(key.spec, value.spec, q_heads * queries)
    slots = keys.pool.shape[2], values.pool.shape[2]
    pools = (0, 0) if listed else (int(slots[0]), int(slots[1]))
    ring, lacks = int(keys.ring.shape[2]), of_values.lacks
    plan = make_plan(
        key.spec, value.spec, q_heads, queries, pools, ring, config, listed,
        lacks is not None,
    )  # fmt: skip
    k_rows, v_rows = of_keys.codes.shape[1], of_values.codes.shape[1]
    tails = 0
    if listed:
        each = TAIL_TILES * config.tokens
        tails = torch.sym_min((sum(slots) + each - 1) // each, MOST_TAILS)
    beside = exact_beside(batch, k_rows, plan, config, q.device)
    apart = 1 + (1 - beside) * (programs_apart(batch, plan, q.device) - 1)
    splits = count_splits(batch, k_rows, plan, config, q.device, tails)
    whole_splits = splits + tails
    exact_programs = (1 - beside) * batch * plan.exact_programs * apart
    pieces = beside * plan.pieces
    folded = _folded(step, of_keys, plan, bool(of_values.params))
    part = step.empty(batch, plan.groups, whole_splits + plan.exacts, plan.rows, plan.attend["VW"])
    stats = step.empty(
        batch, plan.groups, whole_splits + plan.exacts, plan.attend["STATS"], plan.rows
    )
    exact = step.empty(batch, q_heads, queries, plan.exacts, value.dim)
    strides, kind = _bias_strides(step.bias)
    whole = 1 if listed else int(k_rows % config.tokens == 0)
    limit = {"maxnreg": config.registers} if config.registers else {}
    lists = [lengths] * 4 if rows is None else rows
    programs = exact_programs + batch * plan.groups * plan.blocks * whole_splits
    kernel(attend_kernel)[(programs,)](
        *folded, q, of_keys.codes, of_keys.gains, of_values.codes, of_values.gains,
        lengths if step.bias is None else step.bias, lengths,
        keys.pool_positions, values.pool_positions, *_turning(of_keys, plan),
        keys.pool, values.pool, keys.ring, values.ring,
        lengths if lacks is None else lacks, *lists, part, stats, exact,
        splits, tails, apart, exact_programs, pieces, keys.capacity, k_rows, v_rows,
        0 if rows is None else rows.entries.shape[2], *slots,
        *strides, step.factor, **plan.attend, BIAS=kind, CAP=step.softcap, WHOLE=whole,
        ASM=not INTERPRETED, num_warps=config.warps, **limit,
    )  # fmt: skip
    if rows is not None:
        names = ("H", "ROWS", "G", "STATS", "DV", "DVP", "X", "XBLOCKS")
        kernel(value_slots_kernel)[(batch * plan.exact_programs,)](
            values.pool_positions, values.pool, rows.v_scores, lengths, stats, exact, whole_splits,
            slots[1], **{name: plan.attend[name] for name in names}, STRIDE=plan.rows,
            E=SLOTS_AT_ONCE, ASM=not INTERPRETED, num_warps=4,
        )  # fmt: skip
    out = step.empty(
        batch, q_heads, queries, value.dim, dtype=torch.float32 if with_mass else q.dtype
    )
    mass = step.empty(batch, q_heads, queries) if with_mass else None
    mean, synthesis, units = part, part, part
    if of_values.params:
        mean, _, synthesis, units = of_values.params[:4]
    processors = multiprocessors(q.device)
    heads_rows, parts = batch * key.heads * plan.head_rows, plan.merge["PARTS"]
    programs = processors * MERGE.fill // parts
    each = torch.sym_max((heads_rows + programs - 1) // programs, 1)
    kernel(merge_kernel)[((heads_rows + each - 1) // each * parts,)](
        part, stats, exact, lengths if sinks is None else sinks.contiguous(),
        mean, synthesis, units, out, lengths if mass is None else mass, whole_splits, batch, each,
        **plan.merge, SINKS=int(sinks is not None), LSE=int(with_mass),
        SLOTS=merge_slots(plan, config, processors, MOST_TAILS if listed else 0),
        num_warps=MERGE.warps,
    )  # fmt: skip
    return out, mass


def _folded(step: Step, of_keys: Coded, plan: Plan, tabled: bool) -> list[Tensor]:
    """What ``fold_kernel`` leaves, and a table, which values want if they are coded (tabled).

    Stand-ins where keys have no such codes.
    """
    q, batch = step.q, step.q.shape[0]
    if not of_keys.params or of_keys.layout.positional:
        table = step.lengths
        if tabled:
            table = torch.arange(MOST_STACKED, dtype=torch.int32, device=q.device)
        return [q, step.lengths, step.lengths, table]
    table = step.empty(MOST_STACKED, dtype=torch.int32)
    q16 = step.empty(batch, plan.groups, plan.rows, plan.attend["KW"], dtype=torch.float16)
    shift = step.empty(batch, plan.groups, plan.rows)
    centre = step.empty(batch, plan.groups, plan.fold["CHUNKS"], plan.rows)
    head_blocks = plan.attend["H"] * ((batch * plan.head_rows + EXACT_ROWS - 1) // EXACT_ROWS)
    kernel(fold_kernel)[(head_blocks * plan.fold["CHUNKS"],)](
        q, of_keys.params[0], *of_keys.params[2:4], q16, shift, centre, table, step.factor, batch,
        **plan.fold, STEPS=MOST_STACKED, num_warps=4,
    )  # fmt: skip
    return [q16, shift, centre, table]


def _turning(of_keys: Coded, plan: Plan) -> list[Tensor]:
    """Basis, offsets, spans and waves of keys that are turned; stand-ins of others."""
    layout, params = of_keys.layout, of_keys.params
    if not layout.positional:
        return [of_keys.gains] * 4
    mean, _, synthesis, units = params[:4]
    spans, waves = (t.contiguous() for t in params[-2:])
    channels, width = 2 * plan.basis["HALF"], plan.basis["KW"]
    basis = mean.new_empty(layout.heads, channels, width, dtype=torch.float16)
    offsets = mean.new_empty(layout.heads, 2, channels)
    kernel(basis_kernel)[(layout.heads * plan.basis["PARTS"],)](
        mean, synthesis, units, spans, basis, offsets, **plan.basis, num_warps=4
    )
    return [basis, offsets, spans, waves]


def _bias_strides(bias: Tensor | None) -> tuple[tuple[int, int, int], int]:
    """Strides by batch, head and query, 0 where it is broadcast, and the kernel's BIAS."""
    if bias is None:
        return (0, 0, 0), 0
    b, h, q = (0 if size == 1 else bias.stride(i) for i, size in enumerate(bias.shape[:3]))
    return (b, h, q), 1 if bias.shape[1] == bias.shape[2] == 1 else 2
