"""Steps whose attention is written out: what tests of its passes are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .capture import packed, repeat_kv, tokens

Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]
LOWEST = torch.finfo(torch.float32).min


def plain(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def decode(weigh: Weigh) -> Callable[..., Any]:
    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, mask: Tensor) -> Any:
        keys, values = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return weigh(q, repeat_kv(keys), mask) @ repeat_kv(values), keys, values

    return fn


def given(count: int = 1, past: int = 30) -> tuple[Tensor, ...]:
    mask = torch.where(torch.rand(2, 1, count, past + count) < 0.8, 0.0, LOWEST)
    mask[..., -1] = 0.0
    return tokens(count, 4), tokens(count), tokens(count), packed(past), packed(past), mask


SINKS = torch.tensor([-1.0, 0.0, 1.0, 30.0])


def column(q: Tensor, sinks: Tensor) -> Tensor:
    return sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
