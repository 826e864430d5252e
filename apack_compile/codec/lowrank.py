r"""The paper's code: joint-head truncated SVD, a basis for each sequence, 16-bit factors.

    K ~ C_k D_k,  V ~ C_v D_v    with C: S x R (left factors times singular values), D: R x (H * D)

AttentionPack (CVPR 2026, arXiv 2603.23914), section 3.1: heads are joined before the
factorisation, which is a randomised SVD (Halko et al., 2011; two power iterations as in the
paper's code), keys are taken before their rotary embedding, and when the tail of new tokens has
grown long enough everything is factored again at the same rank. Differences here, all in favour of
the method: sinks and the recent window are kept exact, one class for visual and text tokens, and
the output is mapped by D_v once instead of rebuilding every value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .code import Code, CodeRef
from .layout import Layout, scores_of_keys, working_dtype
from .rotation import rotate

FACTOR_DTYPE = torch.float16

REFACTOR = 256
"""Tokens coded with the basis of what came before them until everything is factored again."""


OVERSAMPLED = 8
"""Random directions beyond the rank (Halko et al., 2011, section 4.2)."""


@dataclass(frozen=True)
class LowRankLayout(Layout):
    """``rank`` coefficients of 16 bits for all heads of a token together.

    Attributes:
        rank: R.
        rotary, interleaved: as of :class:`~apack_compile.codec.transform.TransformLayout`.

    Params: ``basis [B, H * D, R]`` with orthonormal columns, with ``rotary`` also
    ``waves [2, rotary]``.
    """

    rank: int
    rotary: int = 0
    interleaved: int = 0

    kind: ClassVar[str] = "lowrank"

    @property
    def param_count(self) -> int:
        """The basis, and what the rotation needs."""
        return 1 + self.positional

    @property
    def positional(self) -> bool:
        """Whether keys are coded before their rotation."""
        return self.rotary > 0

    @property
    def per_sequence(self) -> bool:
        """Every sequence has its own basis."""
        return True

    def payload_fields(self, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], ...]:
        """The coefficients."""
        return ((self.rank, FACTOR_DTYPE),)

    def turned_back(self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None) -> Tensor:
        """``x [B, H, T, D]`` as it is factored: ``[B, T, H * D]``."""
        if self.positional:
            assert positions is not None
            x = rotate(x, positions, -params[-1], bool(self.interleaved))
        return x.transpose(1, 2).flatten(2)

    def encode(
        self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Project on the basis."""
        x = self.turned_back(x.to(working_dtype(x.dtype)), params, positions)
        most = torch.finfo(FACTOR_DTYPE).max
        return [(x @ params[0].to(x.dtype)).clamp(-most, most).to(FACTOR_DTYPE)]  # [B, T, R]

    def decode(
        self, payload: Sequence[Tensor], params: Sequence[Tensor], dtype: torch.dtype,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Coefficients times the basis, and the rotation."""
        work = working_dtype(dtype)
        x = payload[0].to(work) @ params[0].to(work).mT  # [B, T, H * D]
        x = x.unflatten(2, (self.heads, self.dim)).transpose(1, 2)
        if self.positional:
            assert positions is not None
            x = rotate(x, positions, params[-1], bool(self.interleaved))
        return x.to(dtype)

    def scores(
        self, q: Tensor, payload: Sequence[Tensor], params: Sequence[Tensor],
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Against rebuilt keys, as the paper does."""
        return scores_of_keys(q, self.decode(payload, params, q.dtype, positions))

    def mix(self, p: Tensor, payload: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """Mix coefficients, then map each head once."""
        basis = params[0].to(p.dtype).unflatten(1, (self.heads, self.dim))  # [B, H, D, R]
        latent = p @ payload[0].to(p.dtype)[:, None]  # [B, Hq, Q, R]
        by_head = latent.unflatten(1, (self.heads, -1)).flatten(2, 3)  # [B, H, Hq/H * Q, R]
        return (by_head @ basis.mT).unflatten(2, (-1, p.shape[2])).flatten(1, 2)


def factor(
    x: Tensor, layout: LowRankLayout, waves: Tensor | None, positions: Tensor | None,
    counts: Tensor | None = None,
) -> CodeRef:  # fmt: skip
    """The basis of each sequence of ``x [B, H, S, D]``.

    Args:
        x: the tokens.
        layout: the code to make.
        waves: of the rotation, with a positional layout.
        positions: ``[B|1, S]``, with a positional layout.
        counts: ``[B, S]`` bool: tokens that count; None: all.
    """
    rest = [] if waves is None else [waves.float()]
    flat = layout.turned_back(x.float(), rest, positions)  # [B, S, H * D]
    seen = flat.isfinite().all(-1)
    if counts is not None:
        seen = seen & counts
    flat = torch.where(seen[..., None], flat, 0.0)
    rank = min(layout.rank, *flat.shape[1:])
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(0)  # the user's generator stays as it is
        wide = min(rank + OVERSAMPLED, *flat.shape[1:])
        _, _, basis = torch.svd_lowrank(flat, q=wide, niter=2)  # [B, H * D, wide]
    basis = torch.nn.functional.pad(basis[..., :rank], (0, layout.rank - rank))
    return CodeRef(Code(layout, (basis.to(FACTOR_DTYPE), *rest)))
