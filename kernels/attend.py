"""Packed attention: softmax(q k^T * scale + mask) v over codes, pool and ring, in plain PyTorch.

This is the meaning of ``apack::attend`` and its CPU path: Inductor takes it apart and fuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..codec import Layout, parse_layout
from ..codec.layout import working_dtype
from .planes import spread
from .pool import in_reach, override, pooled_mass, pooled_tokens
from .positions import positions_of
from .side import Side


def attend(
    q: Tensor,
    mask: Tensor | None,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    lengths: Tensor,
    scale: float,
    k_layout: str,
    v_layout: str,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    biased: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Attention of ``q`` over one packed layer.

    Args:
        q: queries ``[B, Hq, Q, D]``.
        mask: bool (True: seen) or float (added), ``[B|1, Hq|1, Q|1, S|1]``, or None. S counts
            logical tokens. Never assumed to be causal.
        k, v: the two sides, flat (:class:`Side`).
        lengths: int64 ``[2]``: tokens coded, tokens in the ring; their sum is S.
        scale: factor of the scores.
        k_layout, v_layout: specs of the two codes.
        softcap: scores s become ``softcap * tanh(s / softcap)`` before the mask is added (Gemma 2,
            arXiv 2408.00118); 0: they stay.
        sinks: ``[Hq]``, one score a query head that takes part in the softmax, unmasked, and brings
            no value (gpt-oss, arXiv 2508.10925); or None.
        biased: what to call for :func:`attend_biased`, if not that itself.

    Returns:
        ``[B, Hq, Q, Dv]`` in the dtype of q. Rows that see no token are 0, as in PyTorch's SDPA.
    """
    payload, *_, ring = k[: len(parse_layout(k_layout).payload_fields(k[0].dtype)) + 3]
    bias = torch.ops.apack.score_bias(mask, lengths, payload.shape[1], ring.shape[2], q.dtype)
    return (biased or attend_biased)(
        q, bias, k, v, lengths, scale, k_layout, v_layout, softcap, sinks
    )


def attend_biased(
    q: Tensor,
    bias: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    lengths: Tensor,
    scale: float,
    k_layout: str,
    v_layout: str,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """:func:`attend` with the mask by physical slot: ``apack::score_bias``."""
    key_code, value_code = parse_layout(k_layout), parse_layout(v_layout)
    keys, values = Side.of(k, key_code), Side.of(v, value_code)
    work = working_dtype(q.dtype)
    scaled = q.to(work) * scale
    groups = q.shape[1] // key_code.heads
    capacity, ring = keys.capacity, keys.ring.shape[2]

    def by_kv_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, groups)).flatten(2, 3)  # [B, H, Hq/H * Q, .]

    def by_query_head(x: Tensor) -> Tensor:
        return x.unflatten(2, (groups, -1)).flatten(1, 2)  # [B, Hq, Q, .]

    def against(tokens: Tensor) -> Tensor:
        """Scores against exact tokens ``[B, H, T, D]``."""
        return by_query_head(by_kv_head(scaled) @ tokens.to(work).transpose(-1, -2))

    positions = positions_of(key_code, keys.pool_positions, 0, capacity)
    coded_scores = key_code.scores(
        scaled, spread(keys.payload, key_code), keys.params, positions
    )  # [B, Hq, Q, C]
    if keys.pool.shape[2]:
        coded_scores = override(coded_scores, keys.pool_positions, against(keys.pool), 3)
    scores = torch.cat([coded_scores, against(keys.ring)], -1)  # [B, Hq, Q, C + ring]

    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    absent, lost = absent_tokens(keys, key_code, values, value_code)
    if absent is not None and lost is not None:
        hidden, none = (
            torch.nn.functional.pad(t, (0, ring))[:, None, None] for t in (absent, lost)
        )
        bias = torch.where(hidden, float("-inf"), bias)
        scores = torch.where(none, float("nan"), scores)
    scores = torch.where(bias == float("-inf"), bias, scores + bias)
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.to(work)[:, None, None]  # [Hq, 1, 1]
        top = torch.maximum(top, sink)
    base = torch.where(top == float("-inf"), 0.0, top)
    weights = (scores - base).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sink - base).exp()
    p = weights / torch.where(total == 0, 1.0, total)

    p_coded, p_ring = p.split([capacity, ring], -1)
    out = by_query_head(by_kv_head(p_ring) @ live_only(values.ring, lengths[1]).to(work))
    if values.pool.shape[2]:
        mass = pooled_mass(p_coded, values.pool_positions)  # [B, Hq, Q, E]
        used = in_reach(values.pool_positions, lengths[0])[:, None, :, None]
        pool = torch.where(used, values.pool, 0.0)
        out = out + by_query_head(by_kv_head(mass) @ pool.to(work))
        p_coded = override(p_coded, values.pool_positions, torch.zeros_like(mass), 3)
    payload = [
        live_only(t, lengths[0]) if t.is_floating_point() else t
        for t in spread(values.payload, value_code)
    ]
    out = out + value_code.mix(p_coded, payload, values.params)
    return out.to(q.dtype)


def absent_tokens(
    keys: Side, key_code: Layout, values: Side, value_code: Layout
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Tokens of the payload of which half was dropped: ``[B, C]`` bool each; None: none can be.

    First those that are hidden. Then those of which one half was dropped and the pool has the other
    as it is no number: they are seen, and what comes of them is no number either, in all heads.
    """
    absent = None
    for side, code in ((keys, key_code), (values, value_code)):
        dropped = code.absent(side.payload)
        if dropped is not None:
            dropped = dropped & ~pooled_tokens(side.pool_positions, 0, keys.capacity)
            absent = dropped if absent is None else absent | dropped
    if absent is None:
        return None, None
    broken = torch.zeros_like(absent)
    for side in (keys, values):
        wrong = ~side.pool.isfinite().all(-1).all(1)  # [B, E]
        broken = broken | pooled_tokens(side.pool_positions, 0, keys.capacity, wrong)
    return absent & ~broken, absent & broken


def live_only(tokens: Tensor, count: Tensor) -> Tensor:
    """Tokens ``[..., T, width]`` with stale ones zeroed: 0 * NaN must not reach the output."""
    live = torch.arange(tokens.shape[-2], device=tokens.device) < count
    return torch.where(live[:, None], tokens, 0.0)
