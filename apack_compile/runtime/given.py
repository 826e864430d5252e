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
            have the mask of the one that they come from. It begins with the prompt as the model
            sees it; tokens behind it are text (candidates of assisted decoding, or those that
            follow an eager prefill).

    Raises:
        ValueError: the mask is no such tensor; in the block, there are sequences that it does not
            fit, or it is longer than the prompt. So it is where a prompt is prefilled in parts, and
            for the decoder of an encoder-decoder: they have to do without.
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


def fitted_mask(mask: Tensor, batch: int, length: int) -> Tensor:
    """A mask that was given, for a prompt: ``[B, S]``.

    Args:
        mask: ``[B', S']``.
        batch, length: of the prompt, and what may follow it.

    Raises:
        ValueError: the mask does not fit.
    """
    rows, tokens = mask.shape
    if not rows or batch % rows or tokens > length:
        raise ValueError(
            f"visual_tokens has a mask of shape {(rows, tokens)}; the prompt has {batch} sequences "
            f"of {length} tokens (accepted is a mask of at most so many; where a prompt is "
            "prefilled in parts, or an encoder reads it, none)"
        )
    mask = torch.nn.functional.pad(mask, (0, length - tokens))
    return mask.repeat_interleave(batch // rows, 0)
