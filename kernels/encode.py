"""Encode a whole prefill: codes, pool and ring of one side, in plain PyTorch.

This is the meaning of ``apack::encode`` and its CPU path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..codec import Layout, parse_layout
from ..codec.kinds import KINDS
from ..codec.layout import Judged
from .kinds import all_text
from .levels import prompt_levels
from .planes import filled_planes, padded, planes_by_kind
from .pool import pooled_tokens
from .positions import positions_of
from .running_importance import recent_importance


def encode(
    x: Tensor,
    visible: Tensor | None,
    params: Sequence[Tensor],
    layout: str,
    sinks: int,
    extra: int,
    window: int,
    ring: int,
    chunk: int,
    importance: Tensor | None = None,
    kinds: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Code tokens ``x [B, H, S, D]``; the last ``window`` of them are also the ring.

    Args:
        x: keys or values as attention sees them.
        visible: ``[B, S]`` bool, False where no query sees the token (padding); None: all seen.
        params: the fitted parameters of ``layout``.
        layout: spec of the code.
        sinks, extra: pool slots reserved for the first visible tokens, and on demand, where the
            layout does not want a share of the tokens to stay exact.
        window: recent tokens that stay exact.
        ring: slots of the ring, at least ``window``.
        chunk: payload capacity is a multiple of this, and so is that of planes.
        importance: ``[B, S]``: which tokens come first where a layout has planes; None: those of
            the largest size.
        kinds: where planes are of kinds, those of the tokens ``[B, S]``, and for each kind the
            tokens whose rows its planes have, ``[B, R]`` (:class:`.kinds.SortedTokens`); None: all
            tokens are text.

    Returns:
        Payload tensors ``[B, C, width]`` (planes have fewer rows), pool ``[B, H, E, D]``, its
        positions ``[B, E]``, ring ``[B, H, ring, D]``, the :func:`tally` of the coded tokens; and
        with tiers the importance of the tokens in the ring ``[B, ring]``
        (:func:`.running_importance.recent_importance`).
        Tokens ``0 .. max(S - window, 0)`` count as coded; those in the ring are coded too, and
        coded again when they leave it.
    """
    length, code = x.shape[2], parse_layout(layout)
    first = None
    if code.positional:
        _, first = torch.ops.apack.make_pool(x, visible, None, 1, 0)
    coded = torch.sym_max(length - window, 0)
    here = torch.arange(length, device=x.device)
    seen = here < coded if visible is None else visible & (here < coded)
    kind, *tokens = (kinds or all_text(x, coded, chunk)) if code.plane_kinds else (None,)
    levels = prompt_levels(x, visible, seen, importance, code, sinks, kind)
    parts, judged = encode_tokens(x, params, code, first, 0, levels)
    strain = None if judged is None else judged.strain
    if levels is not None and code.dropped_level is not None:
        # How well a dropped token would be coded does not matter.
        seen = seen & (levels != code.dropped_level)
        strain = None if strain is None else torch.where(seen, strain, 0.0)
    if strain is not None and code.kept:  # slots are counted by the coded tokens, and are theirs
        strain = torch.where(seen, strain, 0.0)
    pool, positions = torch.ops.apack.make_pool(
        x, visible, strain, sinks, code.slots(extra, coded), code.strained
    )
    capacity = (length + chunk - 1) // chunk * chunk
    tokenwise = code.tokenwise
    payload = [padded(part, capacity) for part in parts[:tokenwise]]
    if levels is not None:
        planes = parts[tokenwise:]
        payload += (
            planes_by_kind(planes, levels, code, coded, tokens, chunk)
            if code.plane_kinds
            else filled_planes(planes, levels, code, coded, chunk)
        )
    slots = coded + torch.arange(ring, device=x.device)
    recent = x.index_select(2, slots.clamp(max=length - 1))  # slots past the end: stale
    told = tally(judged, seen, positions, 0, code.kinds_of(levels))
    made = [*payload, pool, positions, recent, told]
    return made + [recent_importance(importance, x, coded, ring)] * code.tracks_importance


def encode_tokens(
    x: Tensor, params: Sequence[Tensor], layout: Layout, pool_positions: Tensor | None,
    start: int | Tensor, levels: Tensor | None = None,
) -> tuple[list[Tensor], Judged | None]:  # fmt: skip
    """Payload, and how well (:meth:`Layout.encode_and_judge`), of tokens ``x [B, H, T, D]``.

    Numbers that are not finite are coded as 0.

    Args:
        x: tokens ``start .. start + T``.
        params: of the code.
        layout: of the code.
        pool_positions: of the cache, ``[B, E]``: says where each sequence begins; not read if the
            code does not ask for positions.
        start: of the first token.
        levels: of the tokens ``[B, T]``, where the layout has planes.
    """
    if layout.kind != "exact":
        x = torch.where(x.isfinite(), x, 0.0)
    positions = None
    if pool_positions is not None:
        positions = positions_of(layout, pool_positions, start, x.shape[2])
    return layout.encode_and_judge(x, params, positions, levels)


def results(layout: Layout) -> int:
    """Tensors that :func:`encode` returns."""
    return len(layout.payload_fields(torch.float32)) + 4 + layout.tracks_importance


def tallies(layout: Layout) -> int:
    """Numbers in the :func:`tally` of a layout."""
    return 3 * (KINDS if layout.plane_kinds else 1)


def tally(
    judged: Judged | None, seen: Tensor, pool_positions: Tensor, start: int | Tensor,
    kinds: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Error, size and number of the tokens that are read from codes: ``[3]`` float32.

    Args:
        judged: of each token; None: all three are 0.
        seen: ``[B|1, T]`` or ``[T]`` bool: tokens that count.
        pool_positions: ``[B, E]``: tokens that are read from the pool.
        start: position of the first token.
        kinds: of each token ``[B, T]``, if kinds have codes of their own: three numbers for each
            kind then, one behind the other.
    """
    if kinds is not None:
        each = [seen & (kinds == kind) for kind in range(KINDS)]
        return torch.cat([tally(judged, mine, pool_positions, start) for mine in each])
    if judged is None:
        return torch.zeros(3, device=pool_positions.device)
    error, size, _ = judged
    counted = seen & ~pooled_tokens(pool_positions, start, error.shape[1])
    sums = [torch.where(counted, t, 0.0).sum() for t in (error, size)]
    return torch.stack([*sums, counted.sum().to(error.dtype)]).float()
