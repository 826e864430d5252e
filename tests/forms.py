"""Decoder blocks put together of the forms in which models write attention, without a family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .plain import VOCAB

HIDDEN, HEADS = 48, 4


@dataclass(frozen=True)
class Form:
    """How one block writes its attention.

    Attributes:
        kv_heads: heads of keys and values; query heads are 4.
        k_dim, v_dim: head_dim of queries and keys, and of values.
        projection: three products, or one that is taken apart.
        heads_first: how heads come before tokens.
        rotary: rotation of queries and keys: of pairs of halves, of neighbours, of a part, as
            complex numbers, by three kinds of positions (time, row and column).
        norm: whether queries and keys are normed head by head.
        repeat: how KV heads become query heads; ``joined`` once they lie side by side.
        cast: whether keys and values are cast between cache and attention.
        attend: SDPA, flex_attention, or written out; ``bmm`` and ``baddbmm`` with heads side by
            side.
        causal: whether prefill is SDPA with ``is_causal`` and no mask.
        scale: what is scaled, where it is written out.
        factor: a tensor that scores are multiplied with, where they are written out: of one
            number, of one for each head, of one for each query; or that they are divided by, as by
            the root of the number of keys.
        softcap: of scores, but for SDPA; 0: none.
        sinks: whether each head has a score more, without a value.
        alibi: whether a bias by position and head is laid over the scores, beside the mask.
        mask: added, filled in (SDPA: given as bool), taken off, as whole numbers too, put in by
            ``where``.
        twice: whether two attentions read the same keys and values.
    """

    kv_heads: Literal[1, 2, 4] = 2
    k_dim: int = 16
    v_dim: int = 16
    projection: Literal["three", "split", "chunk by head"] = "three"
    heads_first: Literal["transpose", "permute"] = "transpose"
    rotary: Literal["none", "halves", "neighbours", "part", "complex", "sections"] = "halves"
    norm: bool = False
    repeat: Literal["expand", "interleave", "sdpa", "joined"] = "expand"
    cast: bool = False
    attend: Literal["sdpa", "flex", "matmul", "einsum", "bmm", "baddbmm"] = "sdpa"
    causal: bool = False
    scale: Literal["query", "scores", "divide", "none"] = "scores"
    factor: Literal["none", "one", "heads", "queries", "divisor", "length"] = "none"
    softcap: Literal[0, 2] = 0
    sinks: bool = False
    alibi: bool = False
    mask: Literal["float", "bool", "taken off", "whole", "where"] = "float"
    twice: bool = False


def turned(x: Tensor, positions: Tensor, kind: str) -> Tensor:
    """``x [B, H, T, D]`` with its rotation at ``positions [B, T]``."""
    if kind == "none":
        return x
    width = x.shape[-1] // 2 if kind == "part" else x.shape[-1]
    part, rest = x[..., :width], x[..., width:]
    rates = 1e4 ** (-torch.arange(0, width, 2, device=x.device) / width)
    angles = positions[:, None, :, None] * rates  # [B, 1, T, width / 2]
    if kind == "complex":
        pairs = torch.view_as_complex(part.reshape(*part.shape[:-1], -1, 2))
        turn = torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(pairs * turn).flatten(-2)
    if kind == "sections":
        three = torch.stack((positions, positions // 2, positions % 7))[:, :, None, :, None] * rates
        sizes = [width // 4, width // 8, width // 8]
        angles = torch.cat([a[i] for i, a in enumerate(three.split(sizes, -1))], -1)
    if kind == "neighbours":
        cos, sin = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)
        other = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
        first, second = part.chunk(2, -1)
        other = torch.cat((-second, first), -1)
    return torch.cat([part * cos + other * sin, rest], -1)


def repeated(x: Tensor, times: int, form: Form) -> Tensor:
    """KV heads as many as query heads."""
    if times == 1 or form.attend == "flex" or (form.repeat == "sdpa" and form.attend == "sdpa"):
        return x
    if form.repeat == "interleave":
        return x.repeat_interleave(times, 1)
    b, h, s, d = x.shape
    if form.repeat == "joined" and form.attend in ("bmm", "baddbmm"):
        return x.reshape(b * h, s, d).repeat_interleave(times, 0)
    if form.repeat == "joined" and h == 1:
        return x.expand(b, times, s, d)
    return x[:, :, None].expand(b, h, times, s, d).reshape(b, h * times, s, d)


class Attention(nn.Module):
    """One block."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.widths = HEADS * form.k_dim, form.kv_heads * form.k_dim, form.kv_heads * form.v_dim
        if form.projection == "three":
            self.parts = nn.ModuleList(nn.Linear(HIDDEN, w, bias=False) for w in self.widths)
        else:
            self.together = nn.Linear(HIDDEN, sum(self.widths), bias=False)
        self.out = nn.Linear(HEADS * form.v_dim, HIDDEN, bias=False)
        self.sinks = nn.Parameter(torch.linspace(-1, 3, HEADS))
        self.factors = nn.Parameter(torch.linspace(0.5, 2, HEADS))

    def projections(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values ``[B, T, H, D]``."""
        form, (b, t, _) = self.form, x.shape
        if form.projection == "three":
            q, k, v = (part(x) for part in self.parts)
        elif form.projection == "split":
            q, k, v = self.together(x).split(self.widths, -1)
        else:
            whole = self.together(x)
            q, k, v = (whole[..., a:b] for a, b in self._bounds())
        dims = form.k_dim, form.k_dim, form.v_dim
        return [y.view(b, t, -1, dim) for y, dim in zip((q, k, v), dims, strict=True)]

    def _bounds(self) -> list[tuple[int, int]]:
        a, b, c = self.widths
        return [(0, a), (a, a + b), (a + b, a + b + c)]

    def forward(
        self, x: Tensor, positions: Tensor, past: tuple[Tensor, Tensor] | None, seen: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        form, (b, t, _) = self.form, x.shape
        q, k, v = (
            y.transpose(1, 2) if form.heads_first == "transpose" else y.permute(0, 2, 1, 3)
            for y in self.projections(x)
        )
        if form.norm:
            q, k = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) for y in (q, k))
        q, k = turned(q, positions, form.rotary), turned(k, positions, form.rotary)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=-2)
        cache = k, v
        if form.cast:
            k, v, q = k.double(), v.double(), q.double()
        attend = self.attend if past is not None or not form.causal else self.attend_causal
        y = attend(q, k, v, seen)
        if form.twice:
            y = y + attend(q.flip(1), k, v, seen)
        y = y.to(x.dtype).transpose(1, 2).reshape(b, t, -1)
        return self.out(y), cache

    def attend_causal(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """A prefill without a mask: ``[B, H, T, D]``."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def attend_flex(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
        """By flex_attention: ``[B, H, T, D]``."""
        form, cap = self.form, self.form.softcap
        slopes, (_, _, t, s) = slopes_of(q.device), seen.shape

        def seen_at(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return seen[b, 0, i, j]

        def score(x: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            x = cap * torch.tanh(x / cap) if cap else x
            return x + slopes[h] * j if form.alibi else x

        blocks = create_block_mask(
            seen_at, q.shape[0], None, t, s, device=str(q.device), BLOCK_SIZE=16
        )
        return flex_attention(q, k, v, score, blocks, scale, enable_gqa=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """``[B, H, T, D]``; ``seen [B, 1, T, S]`` bool."""
        form, length = self.form, k.shape[2]
        k, v = (repeated(x, HEADS // form.kv_heads, form) for x in (k, v))
        least = torch.finfo(q.dtype).min
        scale = 1.0 if form.scale == "none" else form.k_dim**-0.5
        if form.attend == "flex":
            return self.attend_flex(q, k, v, seen, scale)
        added = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, least)
        if form.attend == "sdpa":
            mask = seen if form.mask in ("bool", "where") else added
            gqa = form.repeat == "sdpa" and form.kv_heads < HEADS
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa)
        if form.scale == "query":
            q = q * scale
        (b, _, t, _), s = q.shape, length
        changed = form.softcap or form.factor != "none"  # and the bias would be with the scores
        inside = form.attend == "baddbmm" and not changed
        if form.attend in ("bmm", "baddbmm"):
            q, k, v = (x.reshape(b * HEADS, -1, x.shape[-1]) for x in (q, k, v))
        if form.attend == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
        elif form.attend == "baddbmm":
            slopes = alibi(s, q).expand(b, -1, -1, -1).reshape(b * HEADS, 1, s)
            scores = slopes.baddbmm(
                q, k.transpose(1, 2), beta=float(form.alibi and inside), alpha=0.5
            )
        else:
            scores = torch.matmul(q, k.transpose(-1, -2))
        if form.scale == "scores":
            scores = scores * scale
        elif form.scale == "divide":
            scores = scores / form.k_dim**0.5
        if form.factor != "none":
            scores = self.times_factor(scores.view(b, HEADS, t, s), q)
        if form.softcap:
            scores = torch.tanh(scores / form.softcap) * form.softcap
        scores = scores.view(b, HEADS, t, s)
        if form.alibi and not inside:
            scores = scores + alibi(s, q)
        if form.mask == "float":
            scores = scores + added
        elif form.mask == "taken off":
            scores = scores - 1e9 * (1.0 - seen.to(scores.dtype))
        elif form.mask == "whole":
            scores = scores - 10**6 * (1 - seen.long())
        elif form.mask == "where":
            hidden = torch.tensor(float("-inf"), dtype=scores.dtype, device=scores.device)
            scores = torch.where(~seen, hidden, scores)
        else:
            scores = scores.masked_fill(~seen, least)
        if form.sinks:
            column = self.sinks.reshape(1, -1, 1, 1).expand(b, -1, t, -1)
            scores = torch.cat([scores, column.to(q.dtype)], -1)
        weights = F.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        if form.sinks:
            weights = weights[..., :-1]
        weights = F.dropout(weights, 0.0, self.training)
        if form.attend == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", weights, v)
        if form.attend in ("bmm", "baddbmm"):
            weights = weights.reshape(b * HEADS, t, s)
            return torch.bmm(weights, v).view(b, HEADS, t, form.v_dim)
        return torch.matmul(weights, v)

    def times_factor(self, scores: Tensor, q: Tensor) -> Tensor:
        """``scores [B, H, T, S]`` times a tensor, or over it; queries have any shape."""
        factors, kind = self.factors, self.form.factor
        if kind == "divisor":
            return scores / torch.sqrt(torch.tensor(2.0))
        if kind == "length":
            return scores / scores.shape[-1] ** 0.5
        if kind == "queries":
            factors = 1 + q.reshape(*scores.shape[:3], -1)[..., :1].sigmoid()
        return scores * {"one": factors[1], "heads": factors[:, None, None]}.get(kind, factors)


def slopes_of(device: torch.device) -> Tensor:
    """What a bias grows by from token to token, in each head (arXiv 2108.12409)."""
    return 2.0 ** -torch.arange(1, HEADS + 1, device=device)


def alibi(length: int, like: Tensor) -> Tensor:
    """Biases ``[1, H, 1, S]`` that grow with the position."""
    slopes = slopes_of(like.device)
    return (slopes[:, None, None] * torch.arange(length, device=like.device)).to(like)[None]


class Decoder(nn.Module):
    """Blocks of several forms, with a tuple cache."""

    def __init__(self, forms: list[Form]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(Attention(form) for form in forms)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids: Tensor, valid: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        """Logits and the grown cache; ``valid [B, S]`` is False for padding on the left."""
        length, tokens = valid.shape[1], ids.shape[1]
        rows = torch.arange(length - tokens, length, device=ids.device)[:, None]
        columns = torch.arange(length, device=ids.device)
        seen = ((columns <= rows) & valid[:, None, None, :]) | (columns == rows)
        positions = (valid.cumsum(1) - 1).clamp(min=0)[:, length - tokens :]
        x = self.embed(ids)
        grown = []
        for number, block in enumerate(self.blocks):
            y, cache = block(self.norm(x), positions, None if past is None else past[number], seen)
            x = x + y
            grown.append(cache)
        return self.head(self.norm(x)), tuple(grown)
