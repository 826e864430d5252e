"""The model's forward pass in the parts that training and scoring need.

The same numbers as ``SmolVLMForConditionalGeneration.forward`` gives, without its look at every
pixel for padding, and with logits for chosen tokens alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def see(model: Any, tiles: Tensor) -> Tensor:
    """What the language model gets of images: ``[N, PLACES, hidden]``.

    Args:
        model: of :func:`benchmarks.tiny_vlm.model.build`.
        tiles: uint8 ``[N, SIDE, SIDE, 3]``.
    """
    vision = model.model.vision_model
    x = vision.embeddings.patch_embedding(pixels(tiles, model.dtype))
    x = x.flatten(2).transpose(1, 2)  # [N, patches, vision hidden]
    x = x + vision.embeddings.position_embedding.weight
    for layer in vision.encoder.layers:
        x = layer(x, None)
    return model.model.connector(vision.post_layernorm(x))


def pixels(tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., 3, SIDE, SIDE]`` from -1 to 1, and never 0: transformers takes 0 for padding."""
    return tiles.movedim(-1, -3).to(dtype) / 127.5 - 1


def embed(model: Any, ids: Tensor, places: Tensor, seen: Tensor) -> Tensor:
    """Inputs of the language model, ``[B, S, hidden]``.

    Args:
        model: whose words they are.
        ids: ``[B, S]``.
        places: where images are in ids, flattened: ``[N * PLACES]``.
        seen: of those images, ``[N, PLACES, hidden]``.
    """
    words = model.get_input_embeddings()(ids)
    flat = words.flatten(0, 1)
    return flat.index_copy(0, places, seen.flatten(0, 1).to(flat.dtype)).view_as(words)


def understand(model: Any, inputs: Tensor) -> Tensor:
    """Hidden states behind the last layer, ``[B, S, hidden]``, of rows without padding before."""
    return model.model.text_model(inputs_embeds=inputs, use_cache=False).last_hidden_state


def speak(model: Any, hidden: Tensor, positions: Tensor) -> Tensor:
    """Logits ``[A, V]`` behind the tokens at ``positions [A]`` of the flattened batch."""
    return model.lm_head(hidden.flatten(0, 1)[positions])
