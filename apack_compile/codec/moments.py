"""What a basis is fitted from: second moments of K, V and the queries, never the data itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .rotation import Rotation, Turn

MIN_QUERIES = 32
"""Fewer queries than this say nothing about the queries to come."""


@dataclass(frozen=True)
class Moments:
    """Sums over tokens of one layer; sums of two prefills add up.

    Where the rotation of keys by their position is known, keys and queries are taken without it,
    and :meth:`spread` puts it back for all positions.

    Attributes:
        count: tokens seen, 0-dim float64.
        k_sum, v_sum: ``[H * D]``.
        k_gram, v_gram: sums of outer products, heads side by side: ``[H * D, H * D]``.
        q_gram: outer products of the queries that read each KV head: ``[H, D, D]``.
    """

    count: Tensor
    k_sum: Tensor
    k_gram: Tensor
    v_sum: Tensor
    v_gram: Tensor
    q_gram: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All sums, in the order of the fields."""
        return (self.count, self.k_sum, self.k_gram, self.v_sum, self.v_gram, self.q_gram)

    def __add__(self, other: Moments) -> Moments:
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return Moments(*(mine + theirs.to(mine.device) for mine, theirs in pairs))

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, turn: Turn | None = None,
        sinks: int = 0, among: Tensor | None = None,
    ) -> Moments:  # fmt: skip
        """Moments of one prefill.

        Args:
            q: queries ``[B, Hq, Q, D]``.
            k: keys ``[B, H, S, D]``; v: values ``[B, H, S, Dv]``.
            visible: ``[B, S]`` bool, False for padding; None if every token counts. Queries count
                if their own token does, which needs Q == S; otherwise all queries count.
            turn: the rotation of the tokens, to be undone; None if it is not known.
            sinks: the first visible tokens, which are not coded and do not count.
            among: ``[B, S]`` bool: of the tokens that count, only these; None: all. Sums over
                kinds of tokens add up.

        Tokens with a NaN or an infinity are left out.
        """
        weight = k.isfinite().all(-1).all(1) & v.isfinite().all(-1).all(1)  # [B, S]
        if visible is not None:
            weight = weight & visible
        if sinks:
            weight = weight & (weight.cumsum(1) > sinks)
        if among is not None:
            weight = weight & among
        kept = weight.to(torch.float32)
        if turn is not None:
            k = turn.undo(k.float())
            q = turn.undo(q.float()) if q.shape[2] == k.shape[2] else q

        def flat(x: Tensor) -> Tensor:
            x = x.transpose(1, 2).flatten(2).float()  # [B, S, H * D]
            return torch.where(weight[..., None], x, 0.0).flatten(0, 1)

        k_flat, v_flat = flat(k), flat(v)
        heads, q_len = k.shape[1], q.shape[2]
        q_heads = q.float().unflatten(1, (heads, -1))  # [B, H, Hq/H, Q, D]
        if q_len == k.shape[2]:
            q_heads = torch.where(weight[:, None, None, :, None], q_heads, 0.0)
        q_flat = q_heads.transpose(0, 1).flatten(1, 3)  # [H, B * Hq/H * Q, D]
        q_flat = torch.where(q_flat.isfinite(), q_flat, 0.0)
        if q_len < MIN_QUERIES:  # too few to be a metric: as if queries pointed everywhere
            q_flat = torch.eye(q_flat.shape[-1], device=q.device).expand(heads, -1, -1)
        return cls(
            kept.sum(dtype=torch.float64),
            k_flat.sum(0),
            k_flat.T @ k_flat,
            v_flat.sum(0),
            v_flat.T @ v_flat,
            q_flat.transpose(-1, -2) @ q_flat,
        )

    def spread(self, rotation: Rotation, reach: int) -> Moments:
        """Moments of rotated keys and queries at all positions below ``reach``, float64."""
        return replace(
            self,
            k_sum=rotation.mean(self.k_sum.double(), reach),
            k_gram=rotation.gram(self.k_gram.double(), reach),
            q_gram=rotation.gram(self.q_gram.double(), reach),
        )
