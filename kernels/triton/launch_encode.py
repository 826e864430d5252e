"""Tokens into a packed side by Triton kernels: encode, survey and settle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...codec import TransformLayout
from ...codec.layout import SPARE, STRAINED
from ...codec.transform import LEAST_GAIN, MOST_GAIN
from ..pool import reserve_sinks
from .calls import INTERPRETED
from .encode import encode_kernel
from .launch import DTYPES
from .settle import FIELDS, settle_kernel, survey_kernel

MOST_COLUMNS = 1024
"""Accumulators of a token, padded: more do not fit into registers."""

LONG = 2048
"""From so many tokens on, tiles are large: basis and metric are read once for each tile.

32 tokens, not 64, which run as warp-group products: with those, prompts of 4,096 tokens in bfloat16
(3 heads of 64, 16 or 32 components of each width; 4 heads of 128, mixed codes) ended in an illegal
memory access.
"""

CHANNELS = 32
"""Channels that one product takes."""

BLOCK, CHUNK = 64, 256
"""Tokens that are judged at a time: those of a ring all at once."""


def _pad(n: int, least: int = 16) -> int:
    return max(1 << max(n - 1, 0).bit_length(), least)


def _columns(layout: TransformLayout) -> tuple[int, int, int]:
    """Padded bytes of each run; 0 where there is none."""
    widths = (layout.r8, layout.r4 // 2, layout.r2 // 4)
    return tuple(_pad(w) if w else 0 for w in widths)  # type: ignore[return-value]


class Cut(NamedTuple):
    """How the work of ``encode_kernel`` is cut.

    Attributes:
        tile: tokens of a program.
        channels: that one product takes.
        warps: of a program.
        stages: products whose operands are in flight.
    """

    tile: int
    channels: int
    warps: int
    stages: int


def cut_for(tokens: int, columns: int, dim: int) -> Cut:
    """How to cut the work, by tokens of a sequence, padded accumulators of each, and head_dim."""
    return Cut(16 if tokens < LONG or columns > 512 else 32, min(CHANNELS, dim), 4, 3)


def takes(x: Tensor, layout: object) -> bool:
    """Whether the kernels can code these tokens."""
    if not isinstance(layout, TransformLayout) or layout.shares or layout.kept:
        return False
    p8, p4, p2 = _columns(layout)
    fits = p8 + 2 * p4 + 4 * p2 + _pad(layout.dim) <= MOST_COLUMNS
    return fits and x.dtype in DTYPES and x.numel() > 0


def encode_new(
    x: Tensor, visible: Tensor | None, params: Sequence[Tensor], layout: TransformLayout,
    sinks: int, extra: int, window: int, ring: int, chunk: int,
) -> list[Tensor]:  # fmt: skip
    """:func:`~apack_compile.kernels.encode.encode`."""
    batch, heads, length, dim = x.shape
    capacity = (length + chunk - 1) // chunk * chunk
    payload = [
        torch.empty(batch, capacity, width, dtype=dtype, device=x.device)
        for width, dtype in layout.payload_fields(x.dtype)
    ]
    if capacity > length:
        for part in payload:
            part[:, length:].zero_()
    pool = torch.empty(batch, heads, sinks + extra, dim, dtype=x.dtype, device=x.device)
    positions = torch.empty(batch, sinks + extra, dtype=torch.int64, device=x.device)
    coded = max(length - window, 0)
    begin = torch.zeros(1, dtype=torch.int32, device=x.device)
    tally = _run(x, visible, params, layout, payload, pool, positions, begin, coded, sinks)
    recent = x[:, :, coded : coded + ring]
    if recent.shape[2] < ring:  # slots past the end: stale
        last = x[:, :, -1:].expand(-1, -1, ring - recent.shape[2], -1)
        recent = torch.cat([recent, last], 2)
    return [*payload, pool, positions, recent.contiguous(), tally]


def encode_more(
    x: Tensor, params: Sequence[Tensor], layout: TransformLayout, payload: Sequence[Tensor],
    pool: Tensor, positions: Tensor, begin: Tensor,
) -> Tensor:  # fmt: skip
    """Code ``x [B, H, T, D]`` in place, and say how well.

    Args:
        x, params, layout: tokens, and their code.
        payload, pool, positions: what the tokens are coded into.
        begin: ``[1]`` int32, the place of the first of them: on the device, so that a CUDA graph
            of the call is good for all places.

    Returns:
        The tally of the tokens.
    """
    return _run(x, None, params, layout, payload, pool, positions, begin, x.shape[2], None)


def _run(
    x: Tensor, visible: Tensor | None, params: Sequence[Tensor], layout: TransformLayout,
    payload: Sequence[Tensor], pool: Tensor, positions: Tensor, begin: Tensor, counted: int,
    sinks: int | None,
) -> Tensor:  # fmt: skip
    """All kernels. sinks: slots to reserve in a new pool; None: the pool is there."""
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever tensors are
        return _launched(
            x, visible, params, layout, payload, pool, positions, begin, counted, sinks
        )


def _launched(
    x: Tensor, visible: Tensor | None, params: Sequence[Tensor], layout: TransformLayout,
    payload: Sequence[Tensor], pool: Tensor, positions: Tensor, begin: Tensor, counted: int,
    sinks: int | None,
) -> Tensor:  # fmt: skip
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, tokens, dim = x.shape
    groups, padded = layout.groups, _pad(dim)
    p8, p4, p2 = _columns(layout)
    params = [p.contiguous() for p in params]
    origins = positions  # positions count from the first slot
    if layout.positional and sinks is not None:  # of a pool that is there
        origins = reserve_sinks(visible, x, 1, 0).expand(batch, 1)
    mean, analysis, _, units = params[:4]
    metric, scales, spans = layout.judged_by(params)
    judged = torch.empty(4, batch, groups, tokens, device=x.device)
    columns = p8 + 2 * p4 + 4 * p2 + padded
    cut = cut_for(tokens, columns, padded)
    encode_kernel[(batch * groups * -(-tokens // cut.tile),)](
        x, mean, analysis, units, params[4] if layout.gain else mean, metric, scales, spans,
        payload[0], payload[-1], judged, *x.stride()[:3], params[-1], origins, origins.stride(0),
        begin, tokens, payload[0].shape[1], batch,
        H=heads, D=dim, DP=padded, G=groups, RANK=layout.rank,
        R8=layout.r8, R4=layout.r4, R2=layout.r2, P8=p8, P4=p4, P2=p2, GAIN=layout.gain,
        LEAST=LEAST_GAIN, MOST=MOST_GAIN, TILE=cut.tile, K=cut.channels,
        R=layout.rotary, NEXT=layout.interleaved, ASM=not INTERPRETED,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    tallies = torch.empty(batch, 3, device=x.device)
    slots = positions.shape[1]
    seen = None if visible is None else visible.expand(batch, tokens).contiguous()
    chunk = CHUNK if tokens > BLOCK else BLOCK
    chunks, flags = -(-tokens // chunk), {"G": groups, "SEEN": int(seen is not None), "N": chunk}
    told = judged
    if chunks > 1:
        told = torch.empty(FIELDS, batch, chunks, device=x.device)
        survey_kernel[(chunks, batch)](
            judged, judged if seen is None else seen, told, tokens, counted, batch, chunks,
            **flags, num_warps=1,
        )  # fmt: skip
    settle_kernel[(batch,)](
        judged, x, judged if seen is None else seen, told, pool, positions, tallies,
        *x.stride()[:3], begin, tokens, counted, batch, chunks,
        H=heads, D=dim, DP=padded, E=slots, EP=_pad(slots), SINKS=sinks or 0,
        NEW=int(sinks is not None), SPARE=SPARE, STRAINED=STRAINED, CP=_pad(chunks, 1),
        **flags, num_warps=4,
    )  # fmt: skip
    return tallies.sum(0)
