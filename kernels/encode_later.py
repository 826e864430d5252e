"""Code tokens that come behind a prompt, in place: by kernels, or in plain PyTorch.

How many tokens there are is known to the host; where they belong is a tensor. So all of it can be
captured as a CUDA graph (``runtime/flush.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..codec import Layout
from ..codec.layout import SPARE
from .encode import encode_tokens, tally
from .planes import later_levels, write_later
from .pool import fill_pool
from .running_importance import of_run, worth


def encode_later(
    x: Tensor, params: Sequence[Tensor], layout: Layout, payload: Sequence[Tensor], pool: Tensor,
    positions: Tensor, begin: Tensor, sinks: int, extra: int, weights: Tensor | None = None,
    kernels: Any = None,
) -> Tensor:  # fmt: skip
    """Code ``x [B, H, T, D]``, and say how well (``encode.tally``).

    Args:
        x: tokens.
        params, layout: of the code.
        payload, pool, positions: of the store, with room for the tokens; written in place.
        begin: ``[1]`` int32, tokens that are coded already.
        sinks, extra: slots of the pool, see ``encode.encode``.
        weights: of the tokens ``[B, T]``, where bits go by importance; None: not known.
        kernels: the module that codes these tokens by kernels; None: plain operators do.
    """
    if kernels is not None:
        more: Tensor = kernels.encode_more(x, params, layout, payload, pool, positions, begin)
        return more
    start = begin.reshape(()).long()
    here = start + torch.arange(x.shape[2], device=x.device)
    levels = None
    if layout.shares:
        first = positions[:, :1] if sinks else 0  # what is before is padding
        levels = later_levels(worth(weights, x, start, first), layout)
    parts, judged = encode_tokens(x, params, layout, positions, start, levels)
    # A row begins with its first sink. Kernels do not ask: nor do codes that they serve.
    seen = here >= (positions[:, :1] if sinks and layout.kept else 0)
    held, places = pool, positions
    if pool.shape[2]:
        strain = None if judged is None else judged.strain
        # Slots for tokens to come, and those that a crop left, are not for these tokens.
        wanted = sinks + layout.slots(extra, start + x.shape[2])
        spare = SPARE + pool.shape[2] - wanted
        held, places = fill_pool(pool, positions, x, start, seen, strain, layout.strained, spare)
    sums = tally(judged, seen, places, start, layout.kinds_of(levels))
    for whole, part in zip(payload[: layout.tokenwise], parts, strict=False):
        whole.index_copy_(1, here, part)
    if levels is not None:
        write_later(payload, parts, levels, layout, start)
    pool.copy_(held)
    positions.copy_(places)
    return sums


def encode_oldest(
    tokens: int, live: int, params: Sequence[Tensor], layout: Layout, payload: Sequence[Tensor],
    pool: Tensor, positions: Tensor, ring: Tensor, sums: Tensor, begin: Tensor, sinks: int,
    extra: int, importance: Tensor | None, kernels: Any = None,
) -> None:  # fmt: skip
    """Move the oldest ``tokens`` of a ring with ``live`` ones into the codes, in place.

    Args:
        tokens, live: numbers that a CUDA graph of the call holds.
        params, layout, payload, pool, positions, begin, sinks, extra, kernels: see
            :func:`encode_later`.
        ring: of the store.
        sums: to which the tally of the tokens is added.
        importance: of the tokens of the ring ``[B, ring]``, or None.
    """
    weights = of_run(importance, live)
    rest = ring[:, :, tokens:live].clone()
    oldest = None if weights is None else weights[:, :tokens]
    sums += encode_later(
        ring[:, :, :tokens], params, layout, payload, pool, positions, begin, sinks, extra, oldest,
        kernels,
    )  # fmt: skip
    ring[:, :, : live - tokens] = rest
    if importance is not None and weights is not None:
        importance[:, : live - tokens] = weights[:, tokens:]
