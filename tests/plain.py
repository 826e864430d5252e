"""A tiny decoder without Hugging Face, and greedy decoding of it by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 256


class PlainAttention(nn.Module):
    """Self-attention with a tuple cache, no Hugging Face."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, hidden // heads
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.k = nn.Linear(hidden, kv_heads * self.dim, bias=False)
        self.v = nn.Linear(hidden, kv_heads * self.dim, bias=False)
        self.o = nn.Linear(hidden, hidden, bias=False)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.heads, self.dim).transpose(1, 2)
        k = self.k(x).view(batch, tokens, self.kv_heads, self.dim).transpose(1, 2)
        v = self.v(x).view(batch, tokens, self.kv_heads, self.dim).transpose(1, 2)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        repeat = self.heads // self.kv_heads
        causal = mask is None and past is None
        y = F.scaled_dot_product_attention(
            q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), mask,
            is_causal=causal,
        )  # fmt: skip
        return self.o(y.transpose(1, 2).reshape(batch, tokens, -1)), (k, v)


class PlainDecoder(nn.Module):
    """A decoder that a person might have written by hand."""

    def __init__(self, layers: int = 2, hidden: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, hidden)
        self.place = nn.Embedding(4096, hidden)
        self.layers = nn.ModuleList(PlainAttention(hidden, 4, 2) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(layers))
        self.head = nn.Linear(hidden, VOCAB, bias=False)

    def forward(
        self, ids: Tensor, positions: Tensor, past: Any = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        x = self.embed(ids) + self.place(positions)
        grown = []
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            y, cache = layer(norm(x), None if past is None else past[number], mask)
            x = x + y
            grown.append(cache)
        return self.head(x), tuple(grown)


class SpreadDecoder(PlainDecoder):
    """Its layers may be on several devices; the head is where the last one is."""

    def forward(
        self, ids: Tensor, positions: Tensor, past: Any = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        x = self.embed(ids) + self.place(positions)
        grown = []
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            device = layer.q.weight.device
            x, seen = x.to(device), mask if mask is None else mask.to(device)
            y, cache = layer(norm(x), None if past is None else past[number], seen)
            x = x + y
            grown.append(cache)
        return self.head(x), tuple(grown)


class MappedDecoder(nn.Module):
    """Makes its mask by ``vmap``, as transformers 4 does, and computes more there than it uses.

    ``columns [S]`` are the positions of all tokens, those of ``ids [B, T]`` the last of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decoder = plain_decoder()

    def forward(self, ids: Tensor, columns: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        def row(i: Tensor) -> Tensor:
            torch.sin(i * 1.0)
            return torch.vmap(lambda j: j <= i)(columns)

        rows = columns[-ids.shape[1] :]
        mask = torch.vmap(row)(rows)[None, None].expand(len(ids), 1, -1, -1)
        return self.decoder(ids, rows.expand_as(ids), past, mask)


def plain_decoder() -> PlainDecoder:
    torch.manual_seed(0)
    return PlainDecoder().eval()


def plain_masks(valid: Tensor, queries: int, kind: str) -> Tensor | None:
    """A mask of the last ``queries`` tokens over ``valid [B, S]``: none, bool or float."""
    if kind == "none":
        return None
    length = valid.shape[1]
    rows = torch.arange(length - queries, length)[:, None]
    seen = (torch.arange(length)[None] <= rows) & valid[:, None, None, :].bool()
    # A padded query sees itself, as Hugging Face masks do not let a row see nothing.
    seen = seen | (torch.arange(length)[None] == rows)
    return seen if kind == "bool" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def plain_generate(
    model: Any, ids: Tensor, valid: Tensor, steps: int, kind: str
) -> tuple[Tensor, Any]:
    """Greedy decoding by hand: tokens ``[B, steps]`` and the cache."""
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    logits, past = model(ids, positions, None, plain_masks(valid, ids.shape[1], kind))
    tokens = [logits[:, -1].argmax(-1)]
    for _ in range(steps - 1):
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], 1)
        positions = valid.sum(1, keepdim=True) - 1
        mask = plain_masks(valid, 1, kind)
        logits, past = model(tokens[-1][:, None], positions, past, mask)
        tokens.append(logits[:, -1].argmax(-1))
    return torch.stack(tokens, 1), past


def prefill_padded(ours: Any, ids: Tensor, valid: Tensor) -> Any:
    """The cache of prompts ``ids [B, S]`` padded on the left, of which ``valid`` are tokens."""
    places = (valid.cumsum(1) - 1).clamp(min=0)
    return ours(ids, places, None, plain_masks(valid, ids.shape[1], "bool"))[1]


def decode_padded(ours: Any, past: Any, valid: Tensor, steps: int) -> tuple[Tensor, Any]:
    """Logits ``[B, steps, V]`` of tokens that follow one by one on such a cache, and the cache."""
    found, seen = [], valid
    for step in range(steps):
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        token = torch.full((len(valid), 1), 20 + step)
        out, past = ours(token, seen.sum(1, keepdim=True) - 1, past, plain_masks(seen, 1, "bool"))
        found.append(out)
    return torch.cat(found, 1), past
