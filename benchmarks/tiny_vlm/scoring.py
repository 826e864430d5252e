"""Exact match of answers behind a cache, teacher-forced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..quality.rivals.base import SINKS
from ..quality.subject import dense_cache
from .contexts import Contexts
from .forward import embed, see

KV = list[tuple[Tensor, Tensor]]


def prefill(model: Any, batch: Contexts, blank: bool = False) -> KV:
    """Keys and values ``[B, H, P, D]`` of every layer, of the albums.

    Args:
        model: merged or not.
        batch: what it looks at.
        blank: look at grey tiles instead.
    """
    tiles = torch.full_like(batch.tiles, 127) if blank else batch.tiles
    seen = see(model, tiles.flatten(0, 1).to(model.device))
    places = batch.places(model.config.image_token_id).to(model.device)
    inputs = embed(model, batch.ids.to(model.device), places, seen)
    cache = DynamicCache()
    model.model.text_model(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def forget(kv: KV, generator: torch.Generator) -> KV:
    """Half of the tokens behind the first few, drawn for each row; the same in all layers."""
    rows, _, length, _ = kv[0][0].shape
    others = torch.rand(rows, length - SINKS, generator=generator).argsort(1) + SINKS
    kept = others[:, : (length - SINKS) // 2].sort(1).values
    kept = torch.cat([torch.arange(SINKS).expand(rows, -1), kept], 1)  # [B, kept]

    def take(x: Tensor) -> Tensor:
        index = kept.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index)

    return [(take(k), take(v)) for k, v in kv]


def follow(model: Any, kv: KV, start: int, ids: Tensor) -> Tensor:
    """Most likely next tokens ``[B, T]`` behind each of ``ids``, which stand at ``start`` on."""
    ids = ids.to(model.device)
    positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand_as(ids)
    hidden = model.model.text_model(
        ids, past_key_values=dense_cache(kv), position_ids=positions, use_cache=True
    ).last_hidden_state
    return model.lm_head(hidden).argmax(-1)


def exact(
    predicted: Tensor, following: Tensor, spans: Sequence[Sequence[tuple[int, int]]]
) -> list[float]:
    """Share of each row's answers that greedy decoding gives, to their end.

    It gives an answer if and only if every token of it is the most likely behind those before.
    """
    right = (predicted[:, :-1].cpu() == following[:, 1:].cpu()).tolist()
    return [
        sum(all(row[start - 1 : end - 1]) for start, end in answers) / len(answers)
        for row, answers in zip(right, spans, strict=True)
    ]
