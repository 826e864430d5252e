r"""How much attention the tokens of the ring receive in decoding: ``apack::update_importance_``.

A token has some tens of steps in the ring before it is coded. What it receives there says what it
will receive later, and the bits that it gets go by it (``planes.py``). With every query

    I_s  <-  a I_s + (1 - a) m_s,      m_s  =  1 / Hq  sum_h p_h,s      (AttentionPack, 2603.23914)

where p are the weights of the softmax over the tokens of the ring alone. Only they are compared,
and of no other token a score is needed: on SmolLM2 the order is as good as by weights among all
tokens (docs/quality.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attend import live_only
from .importance import attention_weights

KEEP = 0.9
"""What is kept of the importance behind each query: a. The paper's 0.25 is worse here
(docs/quality.md): the last query before a block is coded would decide for all of it."""

UNKNOWN = -1.0
"""The importance of a token that no query has seen."""


def running_importance(
    before: Tensor, q: Tensor, bias: Tensor, ring: Tensor, lengths: Tensor, scale: float,
    softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The importance of the tokens of a ring behind one step: ``[B, ring]`` float32.

    Args:
        before: that before the step, ``[B, ring]`` float32; :data:`UNKNOWN` if there is none.
        q: queries ``[B, Hq, Q, D]`` of the last Q tokens of the ring.
        bias: what is added to the scores, ``[B|1, Hq|1, Q|1, ring]``: ``apack::score_bias`` of the
            ring alone.
        ring: keys ``[B, H, ring, D]``, those of the step among them.
        lengths: int64 ``[2]``: tokens coded, tokens in the ring.
        scale: factor of the scores.
        softcap, sinks: see :func:`~apack_compile.kernels.attend.attend`.

    A new token begins with what its own query gives to it, one that is unknown with what the first
    query gives. Queries that see no token of the ring, and those whose scores are not numbers, give
    nothing to any token.
    """
    keys = live_only(ring, lengths[1]).to(q.dtype)
    weights = attention_weights(q, keys, bias, scale, softcap, sinks)  # [B, Hq, Q, ring]
    mass = weights.mean(1).nan_to_num(nan=0.0)  # [B, Q, ring]
    queries = q.shape[2]
    row = torch.arange(queries, device=q.device)
    own = torch.arange(ring.shape[2], device=q.device) - lengths[1] + queries  # the token's query
    known = (before >= 0) & (own < 0)  # [B, ring]
    behind = row[:, None] - own.clamp(min=0)  # [Q, ring]: queries behind the first
    share = torch.where(known[:, None] | (behind > 0), 1 - KEEP, 1.0)  # [B, Q, ring]
    left = KEEP ** (queries - 1 - row).to(mass.dtype)  # [Q]: of what a query gives, in the end
    given = torch.where(behind >= 0, share * left[:, None] * mass, 0.0).sum(1)
    return (torch.where(known, before * KEEP**queries, 0.0) + given).float()


def update_importance_(importance: Tensor, *args: Tensor | float | None) -> None:
    """:func:`running_importance` in place.

    Args:
        importance: changed in place.
        args: the other arguments.
    """
    importance.copy_(torch.ops.apack.running_importance(importance, *args))


def of_run(
    held: Tensor | None, live: int, new: int = 0, importance: Tensor | None = None, start: int = 0
) -> Tensor | None:
    """The importance of the tokens of a ring and of those that come behind it: ``[B, live + new]``.

    Args:
        held: of the ring, ``[B, ring]``; None: it is not asked for.
        live: tokens in the ring.
        new: those behind it.
        importance: of all tokens, as the new ones or the last of them see it; None: not known.
        start: the first token of the ring.
    """
    if held is None:
        return None
    before = torch.nn.functional.pad(held[:, :live], (0, new), value=UNKNOWN)
    if importance is None:
        return before
    given = recent_importance(importance, held, start, live + new)
    kept = KEEP**new
    return torch.where(before >= 0, kept * before + (1 - kept) * given, given)


def worth(
    importance: Tensor | None, like: Tensor, start: int | Tensor, first: Tensor | int
) -> Tensor:  # fmt: skip
    """What the levels of tokens go by that are coded together: ``[B, T]``, negative for padding.

    Where the importance of one token of a sequence is unknown, all of them are worth the same, and
    are served in their order: there is no other measure that importance could be mixed with.

    Args:
        importance: ``[B, T]``; None: unknown.
        like: tokens ``[B, H, T, D]`` at positions ``start .. start + T``.
        first: where each sequence begins, ``[B, 1]``, or all; what is before is padding.
    """
    if importance is None:
        importance = like.new_zeros(like.shape[0], like.shape[2], dtype=torch.float32)
    real = start + torch.arange(like.shape[2], device=like.device) >= first  # [B|1, T]
    known = ((importance >= 0) | ~real).all(1, keepdim=True)
    return torch.where(real, torch.where(known, importance, 0.0), -1.0)


def recent_importance(importance: Tensor | None, like: Tensor, start: int, ring: int) -> Tensor:
    """What a ring begins with behind a prefill: ``[B, ring]`` float32.

    Args:
        importance: of all tokens, ``[B, S]`` (``apack::importance``); None: it is not known.
        like: gives batch and device.
        start: the first token of the ring.
        ring: slots of it.

    As in decoding, tokens of the ring share an importance of 1.
    """
    if importance is None:
        return like.new_full((like.shape[0], ring), UNKNOWN, dtype=torch.float32)
    slots = start + torch.arange(ring, device=like.device)
    length = importance.shape[1]
    held = importance.index_select(1, slots.clamp(max=length - 1)).float()
    held = torch.where(slots < length, held, 0.0)
    total = held.sum(1, keepdim=True)
    return held / torch.where(total == 0, 1.0, total)
