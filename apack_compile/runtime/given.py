"""Visual tokens that the user names: a mask for the prompts that a block of code runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_MASK: ContextVar[Tensor | None] = ContextVar("apack_visual_tokens", default=None)


@contextmanager
def visual_tokens(mask: Tensor) -> Iterator[None]:
    """Say which tokens of the prompts in this block are visual, whatever their graphs show.

        with apack_compile.visual_tokens(input_ids == image_token_id):
            model.generate(**inputs)

    Only for the thread, or the asynchronous task, that runs the block; the innermost one counts.

    Args:
        mask: ``[B, S]`` bool, or ``[S]`` for all sequences. Sequences that are repeated (beams)
            have the mask of the one that they come from. The length is that of the prompt as the
            model sees it; where an eager prefill came first (``CompileConfig``), tokens behind the
            mask are text.

    Raises:
        ValueError: the mask is no such tensor; in the block, it does not fit the prompt.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (1, 2):
        what = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(f"mask={what}: accepted is a bool tensor [B, S] or [S]")
    token = _MASK.set(mask if mask.dim() == 2 else mask[None])
    try:
        yield
    finally:
        _MASK.reset(token)


def given_mask() -> Tensor | None:
    """The mask of the block that is running, ``[B', S']``; None: there is none."""
    return _MASK.get()


def fitted_mask(mask: Tensor, batch: int, length: int, first: bool) -> Tensor:
    """A mask that was given, for a prompt: ``[B, S]``.

    Args:
        mask: ``[B', S']``.
        batch, length: of the prompt.
        first: whether the graph sees the prompt itself; else other tokens may follow it.

    Raises:
        ValueError: the mask does not fit.
    """
    rows, tokens = mask.shape
    if not rows or batch % rows or tokens > length or (first and tokens < length):
        raise ValueError(
            f"visual_tokens has a mask of shape {(rows, tokens)}; the prompt has {batch} sequences "
            f"of {length} tokens"
        )
    mask = torch.nn.functional.pad(mask, (0, length - tokens))
    return mask.repeat_interleave(batch // rows, 0)
