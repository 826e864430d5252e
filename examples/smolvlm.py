"""A SmolVLM with SmolLM2 as its decoder and an untrained vision tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from smollm2 import Tokenizer, chat
from transformers import PreTrainedModel, SmolVLMConfig, SmolVLMForConditionalGeneration

SIDE, PATCH, SHUFFLE = 128, 8, 2
"""Pixels of a tile, pixels of a patch, and how many patches each way become one token."""
GRID = 4
"""The photograph is cut into this many tiles each way; one more tile shows all of it."""
PLACEHOLDER = "<empty_output>"
"""A token that SmolLM2 has but does not use in conversation: here, one place in the image."""

TILES = GRID * GRID + 1
TOKENS = TILES * (SIDE // PATCH // SHUFFLE) ** 2


def build(decoder: PreTrainedModel, tokenizer: Tokenizer) -> PreTrainedModel:
    """A SmolVLM whose language model has the weights of ``decoder``.

    The vision tower and the connector are random, so what it says of an image means nothing.
    """
    torch.manual_seed(0)
    config = SmolVLMConfig(
        text_config=decoder.config.to_dict(),
        vision_config={
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        scale_factor=SHUFFLE,
        image_token_id=tokenizer.convert_tokens_to_ids(PLACEHOLDER),
        pad_token_id=decoder.generation_config.pad_token_id,
        tie_word_embeddings=True,
    )
    model = SmolVLMForConditionalGeneration(config).to(decoder.dtype)
    model.model.text_model.load_state_dict(decoder.model.state_dict())
    model.tie_weights()
    model.generation_config = decoder.generation_config
    return model.eval()


def look(tokenizer: Tokenizer, photo: Path, question: str, start: str) -> dict[str, torch.Tensor]:
    """The inputs of ``generate``: a photograph, a question about it, how the answer starts."""
    ids = chat(tokenizer, PLACEHOLDER * TOKENS + "\n" + question, start)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": tiles(Image.open(photo).convert("RGB")),
    }


def tiles(photo: Image.Image) -> torch.Tensor:
    """``[1, TILES, 3, SIDE, SIDE]``: the parts of the photograph, then the whole."""
    large = np.asarray(photo.resize((GRID * SIDE, GRID * SIDE)))
    parts = large.reshape(GRID, SIDE, GRID, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
    whole = np.asarray(photo.resize((SIDE, SIDE)))
    pixels = torch.from_numpy(np.concatenate([parts, whole[None]]))
    return (pixels.permute(0, 3, 1, 2)[None].float() / 127.5) - 1
