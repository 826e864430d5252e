"""Decoders without Hugging Face, as a person might write them by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import zoo
from .registry import TEXT, Decoded, register

ROOM = 128
"""Tokens that a preallocated cache holds."""

Cache = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """``x [B, H, T, D]`` with rotary positions."""
    half = x.shape[-1] // 2
    angles = positions[:, None].float() / 10000 ** (torch.arange(half) / half)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention written out."""
    scores = torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(torch.softmax(scores, -1), v)


class Layer(nn.Module):
    """Attention with two query heads to each KV head; subclasses keep the cache."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.o = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.k, self.v = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)

    def forward(
        self, x: Tensor, start: int, positions: Tensor, past: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        count = x.shape[1]
        q, k, v = (f(x).view(1, count, -1, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotated(q, positions), rotated(k, positions)
        keys, values, mask, grown = self.store(k, v, start, positions, past)
        keys, values = keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
        y = self.attend(q, keys, values, mask)
        return self.o(y.transpose(1, 2).reshape(1, count, -1)), grown

    def store(
        self, k: Tensor, v: Tensor, start: int, positions: Tensor, past: Cache | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Cache | None]:
        """All keys, all values, what is seen of them, the cache."""
        raise NotImplementedError


class Growing(Layer):
    """The cache is a tuple, and grows."""

    def store(
        self, k: Tensor, v: Tensor, start: int, positions: Tensor, past: Cache | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Cache | None]:
        if past is None:
            return k, v, positions[:, None] >= positions, (k, v)
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return k, v, None, (k, v)


class Preallocated(Layer):
    """The cache is a buffer of the layer, written at indices."""

    keys: Tensor
    values: Tensor

    def __init__(self, attend: Attend) -> None:
        super().__init__(attend)
        self.register_buffer("keys", torch.zeros(1, 2, ROOM, 16), persistent=False)
        self.register_buffer("values", torch.zeros(1, 2, ROOM, 16), persistent=False)

    def store(
        self, k: Tensor, v: Tensor, start: int, positions: Tensor, past: Cache | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Cache | None]:
        self.keys[:, :, positions] = k
        self.values[:, :, positions] = v
        return self.keys, self.values, positions[:, None] >= torch.arange(ROOM), None


class Sliced(Preallocated):
    """Written in a slice; what is beyond it is not read."""

    def store(
        self, k: Tensor, v: Tensor, start: int, positions: Tensor, past: Cache | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Cache | None]:
        end = start + k.shape[2]
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        mask = positions[:, None] >= torch.arange(end)
        return self.keys[:, :, :end], self.values[:, :, :end], mask, None


class Decoder(nn.Module):
    """Two layers."""

    def __init__(self, layer: type[Layer], attend: Attend) -> None:
        super().__init__()
        self.embed = nn.Embedding(zoo.VOCAB, 64)
        self.layers = nn.ModuleList(layer(attend) for _ in range(2))
        self.mixers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
            for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))
        self.head = nn.Linear(64, zoo.VOCAB, bias=False)

    def forward(self, ids: Tensor, start: int, past: Any = None) -> tuple[Tensor, Any]:
        x = self.embed(ids)
        positions = start + torch.arange(ids.shape[1])
        grown = []
        for number, layer in enumerate(self.layers):
            before = None if past is None else past[number]
            y, cache = layer(self.norms[number](x), start, positions, before)
            x = x + y
            x = x + self.mixers[number](x)
            grown.append(cache)
        return self.head(x), None if grown[0] is None else tuple(grown)


def greedy(model: Any, inputs: Mapping[str, Any], steps: int) -> Decoded:
    """Greedy decoding by hand."""
    ids, start, past = inputs["input_ids"], 0, None
    tokens, every = [ids], []
    for _ in range(steps):
        logits, past = model(tokens[-1], start, past)
        start += tokens[-1].shape[1]
        every.append(logits[:, -1])
        tokens.append(every[-1].argmax(-1, keepdim=True))
    return Decoded(torch.cat(tokens, 1), tuple(every), past)


def plain(layer: type[Layer], attend: Attend) -> zoo.Case:
    torch.manual_seed(0)
    return zoo.Case(Decoder(layer, attend).eval(), zoo.prompt(0, TEXT, 1, False))


KINDS: dict[str, tuple[type[Layer], Attend]] = {
    "plain, tuples": (Growing, F.scaled_dot_product_attention),
    "plain, tuples, written out": (Growing, by_hand),
    "plain, buffers by index": (Preallocated, F.scaled_dot_product_attention),
    "plain, buffers by slice": (Sliced, F.scaled_dot_product_attention),
    "plain, buffers by slice, written out": (Sliced, by_hand),
}

for _name, (_layer, _attend) in KINDS.items():
    register(_name, partial(plain, _layer, _attend), greedy)
