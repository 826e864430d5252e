r"""How much attention tokens receive: ``apack::importance``.

SDPA never shows its probabilities, so those of the last queries of a prefill are computed once
more (an observation window: SnapKV, arXiv 2404.14469; AttentionPack, arXiv 2603.23914, 3.3):

    I_s  =  1 / (Hq W)  sum_h sum_t  p_h,t,s        t: the last W queries, or all if there are fewer
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codec.layout import scores_of_keys, working_dtype
from .visible import hiding

OBSERVED = 64
"""Queries W: at S = 4,096 one part in 64 of the scores of a prefill (one in 32 if it is causal)."""

PIECE = 8
"""Queries at a time: the scores of all would take more memory than the cache, if it is long."""


def importance(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mean attention weight that each token gets from the last queries: ``[B, S]`` float32.

    Args:
        q: queries ``[B, Hq, Q, D]``.
        k: keys ``[B, H, S, D]``, in any dtype.
        mask: bool (True: seen) or float (added), broadcastable to ``[B, Hq, Q, S]``; or None.
        causal: whether token t sees tokens ``0 .. t`` alone (counted from the first key).
        scale: factor of the scores.
        softcap, sinks: see :func:`~apack_compile.kernels.attend.attend`.

    Queries that see nothing give nothing (padding), and bring the mean down for the whole sequence
    alike: what counts is the order of tokens. Where a score is not a number, no order is known, and
    all tokens of the sequence have the same importance.
    """
    last = torch.arange(OBSERVED, device=q.device) - OBSERVED + q.shape[2]
    total = q.new_zeros(q.shape[0], k.shape[2], dtype=working_dtype(q.dtype))
    keys = k.to(q.dtype)
    for numbers in last.split(PIECE):
        rows = numbers.clamp(min=0)  # of fewer queries the first one is read again, for nothing
        some = None if mask is None else _of_rows(mask, rows)
        if causal:
            seen = torch.arange(k.shape[2], device=q.device) <= rows[:, None]
            some = hiding(some, seen)
        weights = attention_weights(q.index_select(2, rows), keys, some, scale, softcap, sinks)
        total += torch.where((numbers >= 0)[:, None], weights, 0.0).sum((1, 2))
    queries = torch.sym_min(q.shape[2], OBSERVED)
    return (total / (q.shape[1] * queries)).float().nan_to_num(nan=1.0)


def _of_rows(mask: Tensor, rows: Tensor) -> Tensor:
    """The mask of some of the queries."""
    return mask.index_select(-2, rows) if mask.dim() >= 2 and mask.shape[-2] != 1 else mask


def attention_weights(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:  # fmt: skip
    """Attention weights ``[B, Hq, Q, S]`` of queries to dense keys, in the working dtype.

    Args:
        q, k, mask, scale, softcap, sinks: see :func:`importance`; the mask is of these queries.
            Rows that see nothing are 0.
    """
    work = working_dtype(q.dtype)
    # Scaled before the product: unscaled scores may be more than float16 holds.
    scores = scores_of_keys((q.to(work) * scale).to(q.dtype), k).to(work)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = torch.where(mask, scores, float("-inf"))
        else:
            scores = scores + mask.to(work)
    if sinks is not None:
        sink = sinks.to(work).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - torch.where(top == float("-inf"), 0.0, top)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights[..., : k.shape[2]] / torch.where(total == 0, 1.0, total)
