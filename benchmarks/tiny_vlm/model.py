"""A SmolVLM around SmolLM2: an own vision transformer, a connector, low-rank changes of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from .prompt import IMAGE, PLACES
from .tiles import SIDE

SHUFFLE = 2
"""How many patches each way become one token."""

PATCH = SIDE // (math.isqrt(PLACES) * SHUFFLE)
"""Pixels of a patch, each way."""

CHANGED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Matrices of a decoder layer that get a low-rank change."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is trained: the vision transformer, and the rank of changes."""

    hidden: int = 384
    inner: int = 1536
    layers: int = 8
    heads: int = 6
    rank: int = 32


class Changed(nn.Module):
    """A frozen linear layer with a low-rank change: ``x W^T + x down^T up^T``.

    LoRA, Hu et al., ICLR 2022 (arXiv 2106.09685), section 4.1, with its factor alpha / r at 1. Not
    a parametrization of the weight: torch makes a class for each of those, so that every decoder
    layer would be compiled anew, and whole matrices would need gradients.

    Args:
        base: the layer; it is frozen.
        rank: of the change.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        self.register_buffer("strength", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, changed."""
        low = functional.linear(x, self.down) * self.strength
        return self.base(x) + functional.linear(low, self.up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same as a plain layer."""
        self.base.weight += self.up @ self.down
        return self.base


def build(decoder: Any, tokenizer: Any, sizes: Sizes, seed: int = 0) -> Any:
    """A model whose language model is ``decoder``, frozen; the rest is random and trainable.

    Args:
        decoder: of the Llama family, float32.
        tokenizer: of SmolLM2.
        sizes: of the rest.
        seed: of its initial weights.
    """
    torch.manual_seed(seed)
    config = SmolVLMConfig(
        text_config=decoder.config.to_dict(),
        vision_config={
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.inner,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        scale_factor=SHUFFLE,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        tie_word_embeddings=True,
    )
    model = SmolVLMForConditionalGeneration(config)
    model.model.text_model.load_state_dict(decoder.model.state_dict())
    model.tie_weights()
    model.generation_config = decoder.generation_config
    for part in (model.model.text_model, model.lm_head):
        part.requires_grad_(False)
    table = decoder.get_input_embeddings().weight.detach()
    connector = model.model.connector.modality_projection.proj
    # Vision ends in a layer norm: its channels have variance 1, and images the size of words.
    nn.init.normal_(connector.weight, std=float(table.std()) / math.sqrt(connector.in_features))
    for module in list(model.model.text_model.modules()):
        for name, child in list(module.named_children()):
            if name in CHANGED:
                setattr(module, name, Changed(child, sizes.rank))
    return model.eval()


def trained(model: Any) -> dict[str, Tensor]:
    """Names and values of the parameters that are trained."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def merge(model: Any) -> None:
    """Turn changed layers into plain ones."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Changed):
                setattr(module, name, child.merged())


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """The language model as it was before training."""
    changes = [module for module in model.modules() if isinstance(module, Changed)]
    for change in changes:
        change.strength.fill_(0.0)
    try:
        yield
    finally:
        for change in changes:
            change.strength.fill_(1.0)
