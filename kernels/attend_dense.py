"""Dense attention to a cache of which some tokens were dropped: ``present`` and ``attend_dense``.

Where many new tokens meet a packed cache, a layer attends to a dense copy of it. A token that was
dropped has no place there: it has to be hidden, whatever the mask of the model says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..codec import parse_layout
from .attend import absent_tokens
from .importance import attention_weights
from .side import Side
from .visible import hiding


def present(
    k: Sequence[Tensor], v: Sequence[Tensor], lengths: Tensor, length: int, k_layout: str,
    v_layout: str,
) -> Tensor:  # fmt: skip
    """Which of the first ``length`` tokens of a layer are there: ``[B, length]`` bool.

    Args:
        k, v: its two sides, flat (:class:`Side`).
        lengths: int64 ``[2]``: tokens coded, tokens in the ring.
        length: at most the sum of ``lengths``.
        k_layout, v_layout: specs of the codes.
    """
    key_code, value_code = parse_layout(k_layout), parse_layout(v_layout)
    keys, values = Side.of(k, key_code), Side.of(v, value_code)
    absent, _ = absent_tokens(keys, key_code, values, value_code)
    here = torch.arange(length, device=keys.ring.device)
    if absent is None:
        return (here >= 0).repeat(keys.ring.shape[0], 1)
    at = here.clamp(max=keys.capacity - 1)
    return ~absent.index_select(1, at) | (here >= lengths[0])


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, there: Tensor, causal: bool, scale: float,
    softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of ``q [B, Hq, Q, D]`` to ``k, v [B, H, S, D]``: ``[B, Hq, Q, Dv]``.

    Args:
        q, k, v: dense.
        mask: bool (True: seen) or float (added), broadcastable to ``[B, Hq, Q, S]``; or None.
        there: ``[B, P]`` bool, False: the token is hidden. Tokens behind P are there.
        causal: whether query t sees tokens ``0 .. t`` alone.
        scale, softcap, sinks: see :func:`~apack_compile.kernels.attend.attend`.
    """
    length = k.shape[2]
    seen = torch.nn.functional.pad(there, (0, length - there.shape[1]), value=True)[:, None, None]
    if causal:
        rows = torch.arange(q.shape[2], device=q.device)
        seen = seen & (torch.arange(length, device=q.device) <= rows[:, None])
    mask = hiding(mask, seen)
    k, v = k.to(q.dtype), v.to(q.dtype)
    if not softcap and sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    p = attention_weights(q, k, mask, scale, softcap, sinks).to(q.dtype)
    grouped = p.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, H, Hq/H * Q, S]
    return (grouped @ v).unflatten(2, (-1, q.shape[2])).flatten(1, 2)
