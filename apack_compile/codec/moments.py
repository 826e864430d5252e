"""What a basis is fitted from: second moments of K, V and the queries, never the data itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..compat import full_precision
from .rotation import Rotation, Turn
from .spectrum import head_groups

MIN_QUERIES = 32
"""Fewer queries than this say nothing about the queries to come."""


@dataclass(frozen=True)
class Moments:
    """Sums over tokens of one layer, float64; sums of two prefills add up.

    Where the rotation of keys by their position is known, keys and queries are taken without it,
    and :meth:`spread` puts it back for all positions.

    Attributes:
        count: tokens seen, 0-dim float64.
        k_sum, v_sum: ``[H * D]``.
        k_gram, v_gram: sums of outer products by group of heads (``head_groups``), the heads of a
            group side by side: ``[G, n, n]``.
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
            weight = weight & among.to(weight.device)  # layers may be elsewhere than the mask
        if turn is not None:
            k = turn.undo(k.float())
            q = turn.undo(q.float()) if q.shape[2] == k.shape[2] else q

        heads, q_len = k.shape[1], q.shape[2]
        q_heads = q.float().unflatten(1, (heads, -1))  # [B, H, Hq/H, Q, D]
        if q_len == k.shape[2]:
            q_heads = torch.where(weight[:, None, None, :, None], q_heads, 0.0)
        q_flat = q_heads.transpose(0, 1).flatten(1, 3)  # [H, B * Hq/H * Q, D]
        q_flat = torch.where(q_flat.isfinite(), q_flat, 0.0)
        if q_len < MIN_QUERIES:  # too few to be a metric: as if queries pointed everywhere
            q_flat = torch.eye(q_flat.shape[-1], device=q.device).expand(heads, -1, -1)
        with full_precision(q.device):
            sums = (*_sums(k, weight), *_sums(v, weight))
            return cls(weight.sum().double(), *sums, (q_flat.mT @ q_flat).double())

    def spread(self, rotation: Rotation, reach: int) -> Moments:
        """Moments of rotated keys and queries at all positions below ``reach``, float64."""
        return replace(
            self,
            k_sum=rotation.mean(self.k_sum, reach),
            k_gram=rotation.gram(self.k_gram, reach),
            q_gram=rotation.gram(self.q_gram, reach),
        )


def _sums(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sums of outer products by group of the tokens of ``x`` that count, float64.

    Products are taken of differences from the mean: in float32 a large mean would drown them.
    """
    groups = head_groups(x.shape[1], x.shape[3])
    tokens = x.transpose(1, 2).flatten(2).float()  # [B, S, H * D]
    tokens = torch.where(weight[..., None], tokens, 0.0).flatten(0, 1)  # [B * S, H * D]
    count = weight.sum()
    mean = tokens.sum(0, dtype=torch.float64) / count.clamp_min(1)
    centred = torch.where(weight.flatten()[:, None], tokens - mean.float(), 0.0)
    parts = centred.unflatten(1, (groups, -1)).transpose(0, 1)  # [G, B * S, n]
    rounded = mean.float().double().view(groups, -1)
    left = centred.sum(0, dtype=torch.float64).view(groups, -1)  # what rounding the mean left
    cross = left[:, :, None] * rounded[:, None]
    gram = (parts.mT @ parts).double() + cross + cross.mT
    return mean * count, gram + count * rounded[:, :, None] * rounded[:, None]
