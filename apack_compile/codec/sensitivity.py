r"""How much an error of keys and values changes what the model says, layer by layer.

To second order, a small error d of a cached token changes the next-token distribution by
KL = 1/2 E_y (g . d)^2, with y drawn from the model's own distribution and g the gradient of
log p(y) with respect to the token (the Fisher information). Summed over the cached tokens this
gives for each KV head the metric M = sum_t E[g_t g_t^T] in which a code of that head should be
best, and at the same time the weight of the layer against all others, for keys as for values.

Only queries far behind a token count: recent tokens are exact, and most of the gradient of a token
comes from its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..compat import full_precision
from .rotation import Rotation, Turn


@dataclass(frozen=True)
class Sensitivity:
    """Metrics of one layer.

    Attributes:
        k: ``[H, D, D]`` float64, for one query token; like moments, of keys before rotation.
        v: ``[H, Dv, Dv]``.
    """

    k: Tensor
    v: Tensor

    @classmethod
    def of(
        cls, k_grad: Tensor, v_grad: Tensor, coded: Tensor, queries: int, turn: Turn | None
    ) -> Sensitivity:
        """From gradients of the log-probability of sampled tokens.

        Args:
            k_grad: ``[B, H, S, D]``; v_grad: ``[B, H, S, Dv]``.
            coded: ``[B, S]`` bool: tokens that a code will hold.
            queries: tokens drawn, over all draws that will be added up.
            turn: the rotation of the S tokens, to be undone; None if it is not known.
        """
        coded = coded.to(k_grad.device)
        k = k_grad.float() if turn is None else turn.undo(k_grad.float())

        def gram(g: Tensor) -> Tensor:
            flat = (
                torch.where(coded[:, None, :, None], g.float(), 0.0).transpose(0, 1).flatten(1, 2)
            )
            return (flat.mT @ flat).double() / queries

        with full_precision(k.device):
            return cls(gram(k), gram(v_grad))

    def __add__(self, other: Sensitivity) -> Sensitivity:
        return Sensitivity(self.k + other.k, self.v + other.v)

    def scaled(self, factor: float) -> Sensitivity:
        """Both metrics times a number."""
        return Sensitivity(self.k * factor, self.v * factor)

    @property
    def trace(self) -> float:
        """Of both metrics, over all heads."""
        return float(sum(m.diagonal(dim1=-2, dim2=-1).sum() for m in (self.k, self.v)))

    def spread(self, rotation: Rotation, reach: int) -> Sensitivity:
        """The metric of rotated keys at all positions below ``reach``."""
        return replace(self, k=rotation.gram(self.k, reach))

    @property
    def is_finite(self) -> bool:
        """Whether the gradients were numbers."""
        return bool(self.k.isfinite().all() and self.v.isfinite().all())
