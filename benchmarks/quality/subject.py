"""The model under test, and what it does with a dense cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .rivals.attention import received
from .rivals.base import RECENT, Layer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import smollm2 as smollm2  # others take it from here

LIMIT = 8192
"""Positions that SmolLM2 was trained for."""


class Subject:
    """A decoder of the Llama family, alone or behind the vision tower of a SmolVLM.

    Args:
        model: in evaluation mode, where it shall run.
        tokenizer: its tokenizer, with a chat template.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device: torch.device = model.device
        config = model.config.get_text_config()
        self.decoder: Any = getattr(model.model, "text_model", model.model)
        self.layers: int = config.num_hidden_layers
        self.heads: int = config.num_key_value_heads
        self.q_heads: int = config.num_attention_heads
        self.dim: int = config.hidden_size // config.num_attention_heads

    @classmethod
    def load(cls, device: str) -> Subject:
        """SmolLM2-135M-Instruct in float32."""
        return cls(smollm2.load_model().to(device), smollm2.load_tokenizer())

    def prefill(self, ids: Tensor) -> tuple[list[Layer], Tensor]:
        """Run the stock model on prompts: see :class:`Prompts`.

        Returns:
            The cache of each layer, and the logits ``[B, V]`` behind the last token.
        """
        cache = DynamicCache()
        with self._attention() as seen:
            out = self.model(**as_inputs(ids), past_key_values=cache, logits_to_keep=1)
        cos, sin = self._rotation(ids.shape[1])
        layers = [
            Layer(held.keys, held.values, cos, sin, queries, got)
            for held, (queries, got) in zip(cache.layers, seen, strict=True)
        ]
        return layers, out.logits[:, -1]

    def visual(self, prompts: Tensor) -> Tensor | None:
        """Which tokens of embeddings ``[B, S, hidden]`` are of images: ``[B, S]`` bool.

        Those that are no row of the table of text, bit for bit; None: prompts are token ids.
        """
        if prompts.ndim == 2:
            return None
        table = self.model.get_input_embeddings().weight.detach()
        generator = torch.Generator().manual_seed(0)
        keys = torch.randint(1 << 40, (table.shape[1],), generator=generator).to(table.device)

        def digest(x: Tensor) -> Tensor:
            bits = torch.int32 if x.dtype == torch.float32 else torch.int16
            return (x.contiguous().view(bits).long() * keys).sum(-1)

        known = torch.cat([digest(part) for part in table.split(4096)])
        rows = [torch.isin(digest(row.to(table)), known, invert=True) for row in prompts]
        return torch.stack(rows)

    def follow(
        self, kv: Sequence[tuple[Tensor, Tensor]], start: int, ids: Tensor, piece: int | None = None
    ) -> Tensor:
        """Logits ``[B, T, V]`` of tokens ``ids [B, T]`` that follow on a dense cache.

        Args:
            kv: keys and values of each layer, ``[B, H, S', D]``; they stay as they are.
            start: position of the first of the tokens; more than S' where tokens were dropped.
            ids: the tokens.
            piece: how many of them at once; None: all.
        """
        cache = dense_cache(kv)
        positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand_as(ids)
        size = piece or ids.shape[1]
        logits = [
            self.model(some, past_key_values=cache, position_ids=at).logits
            for some, at in zip(ids.split(size, 1), positions.split(size, 1), strict=True)
        ]
        return torch.cat(logits, 1) if piece else logits[0]

    def continue_greedily(self, layers: Sequence[Layer], logits: Tensor, count: int) -> Tensor:
        """The model's own continuation ``[B, count]`` of what was prefilled."""
        cache = dense_cache([(layer.k, layer.v) for layer in layers])
        token = logits.argmax(-1, keepdim=True)  # [B, 1]
        tokens = [token]
        for _ in range(count - 1):
            logits = self.model(token, past_key_values=cache).logits[:, -1]
            token = logits.argmax(-1, keepdim=True)
            tokens.append(token)
        return torch.cat(tokens, 1)

    def _rotation(self, length: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(length, device=self.device)[None]
        like = torch.zeros(1, device=self.device)
        cos, sin = self.decoder.rotary_emb(like, positions)
        return cos[0], sin[0]  # [S, D]

    @contextmanager
    def _attention(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Collects ``queries`` and ``received`` of each layer: see :class:`Layer`."""
        seen: list[tuple[Tensor, Tensor]] = []

        def collect(module: Any, args: Any, kwargs: Any) -> None:
            hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
            q, k = (
                project(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
                for project in (module.q_proj, module.k_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            seen.append((q[:, :, -RECENT:].clone(), received(q, k)))

        hooks = [
            layer.self_attn.register_forward_pre_hook(collect, with_kwargs=True)
            for layer in self.decoder.layers
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


def dense_cache(kv: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache that starts with these keys and values."""
    cache = DynamicCache()
    for index, (k, v) in enumerate(kv):
        cache.update(k, v, index)
    return cache


Inputs = dict[str, Tensor]
"""Arguments of the model's forward; the first of them has the tokens, ``[B, S, ...]``."""


def as_inputs(prompts: Tensor) -> Inputs:
    """Token ids ``[B, S]`` or embeddings ``[B, S, hidden]``, as models name them."""
    return {"input_ids" if prompts.ndim == 2 else "inputs_embeds": prompts}


@dataclass
class Prompts:
    """Prompts of one length, with the stock model's cache of them.

    Attributes:
        ids: int64 ``[B, S]``; or embeddings ``[B, S, hidden]``, those of images among them.
    """

    subject: Subject
    ids: Tensor

    @property
    def length(self) -> int:
        """Tokens of each prompt."""
        return self.ids.shape[1]

    @cached_property
    def prefilled(self) -> tuple[list[Layer], Tensor]:
        """What :meth:`Subject.prefill` gives, computed once and kept on the host.

        Caches of all windows at once would take more of a GPU than what is measured.
        """
        layers, logits = self.subject.prefill(self.ids)
        return [layer.to(torch.device("cpu")) for layer in layers], logits.cpu()

    @property
    def layers(self) -> list[Layer]:
        """The dense cache, where the model is."""
        return [layer.to(self.subject.device) for layer in self.prefilled[0]]

    @property
    def logits(self) -> Tensor:
        """``[B, V]`` behind the last token."""
        return self.prefilled[1].to(self.subject.device)

    def release(self) -> None:
        """Let go of the dense cache, until it is asked for again."""
        self.__dict__.pop("prefilled", None)
