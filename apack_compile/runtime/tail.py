"""Work on the last tokens of a prompt alone, where an operator lets one: all others are cache.

    linear(x [B, S, C])         rows of tokens are independent
    attention(q, k, v)          queries are; keys and values of all tokens are read

What tokens before the last ones bring to the work of the last ones is their keys and values, and
those are given. So they need no gradients: a step backwards through these two operators, most of
the arithmetic of a model, takes the part of the last tokens (256 of 4,500, say). If the caches are
known from another run, they need not be computed at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LINEAR = (torch._C._nn.linear, torch.nn.functional.linear)
ATTENTION = torch._C._nn.scaled_dot_product_attention


class Tail:
    """Runs operators on ``length`` tokens of which the last ``tail`` work.

    Args:
        length: tokens S of the prompt.
        tail: tokens at its end.
        known: whether the others need not be computed: their results are 0.
    """

    def __init__(self, length: int, tail: int, known: bool) -> None:
        self.length = length
        self.past = length - tail
        self.known = known

    def call(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The operator's result; as it is where it is none of the two, or has other shapes."""
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.dim() < 3:
            return target(*args, **kwargs)
        if target in LINEAR and x.dim() == 3 and x.shape[1] == self.length:
            rest = args[1:]
            return self._joined(x, 1, lambda part, _: target(part, *rest, **kwargs))
        if target is ATTENTION and x.dim() == 4 and x.shape[2] == self.length:
            return self._attention(*args, **kwargs)
        return target(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, **more: Any,
    ) -> Any:  # fmt: skip
        def part(q: Tensor, where: slice) -> Tensor:
            k, v, mask, causal = key, value, attn_mask, is_causal
            if is_causal and where.stop:  # the first queries see the first keys
                k, v = key[:, :, : where.stop], value[:, :, : where.stop]
            elif is_causal:
                at = torch.arange(max(self.length, key.shape[2]), device=q.device)
                mask, causal = at[: key.shape[2]] <= at[where.start : self.length, None], False
            elif mask is not None and mask.shape[-2] != 1:
                mask = mask[..., where, :]
            return ATTENTION(q, k, v, mask, dropout_p, causal, **more)

        return self._joined(query, 2, part)

    def _joined(self, x: Tensor, dim: int, part: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Results of both parts of ``x`` along ``dim``; gradients go through the last tokens."""
        work = part(x.narrow(dim, self.past, x.shape[dim] - self.past), slice(self.past, None))
        if self.known:
            before = work.new_zeros(*work.shape[:dim], self.past, *work.shape[dim + 1 :])
        else:
            with torch.no_grad():
                before = part(x.narrow(dim, 0, self.past), slice(0, self.past))
        return torch.cat([before, work], dim)
