"""Gemma and what reads images with it: layers with sliding windows between layers without."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from .. import zoo
from ..zoo import IMAGE
from .registry import TEXT, family

LAYERS = ["sliding_attention", "full_attention"]
WINDOW: dict[str, Any] = dict(head_dim=16, sliding_window=16, layer_types=LAYERS)


@family
def paligemma() -> zoo.Case:
    return zoo.paligemma(text=TEXT)


@family
def gemma3() -> zoo.Case:
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(
            **zoo.text_config(**WINDOW, query_pre_attn_scalar=16)
        ),
        vision_config=transformers.SiglipVisionConfig(
            **zoo.vision_config(image_size=56, vision_use_head=False)
        ),
        image_token_index=IMAGE, boi_token_index=IMAGE + 1, eoi_token_index=IMAGE + 2,
        mm_tokens_per_image=4,
    )  # fmt: skip
    inputs = {**zoo.prompt(4, TEXT, 1, False), "pixel_values": zoo.picture(1, 56)}
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return zoo.Case(zoo.make("Gemma3ForConditionalGeneration", config), inputs)


@family
def gemma3n() -> zoo.Case:
    """Its language model: the last two layers look at the keys and values of the two before."""
    config = transformers.Gemma3nTextConfig(
        **zoo.text_config(**{**WINDOW, "layer_types": LAYERS * 2}, num_hidden_layers=4),
        vocab_size_per_layer_input=zoo.VOCAB, hidden_size_per_layer_input=8,
        num_kv_shared_layers=2, laurel_rank=4, altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    model = zoo.make("Gemma3nForCausalLM", config)
    for name, weight in model.named_parameters():
        if name.endswith("q_norm.weight"):
            weight.data.mul_(0.25)  # scores are not scaled: each query would see one token
    return zoo.Case(model, zoo.prompt(0, TEXT, 1, False))


@family
def gemma4() -> zoo.Case:
    """Full layers have larger heads than sliding ones."""
    text = transformers.Gemma4TextConfig(
        **zoo.text_config(**WINDOW), vocab_size_per_layer_input=zoo.VOCAB,
        hidden_size_per_layer_input=8, num_kv_shared_layers=0,
        per_layer_config={"01": {"head_dim": 32}},
    )  # fmt: skip
    vision = transformers.Gemma4VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, patch_size=4, pooling_kernel_size=2,
        position_embedding_size=64,
    )  # fmt: skip
    config = transformers.Gemma4Config(
        text_config=text, vision_config=vision, audio_config=None, image_token_id=IMAGE,
        video_token_id=IMAGE + 1, audio_token_id=IMAGE + 2, boi_token_id=IMAGE + 3,
        eoi_token_id=IMAGE + 4, boa_token_id=IMAGE + 5, eoa_token_index=IMAGE + 6,
    )  # fmt: skip
    inputs = zoo.prompt(4, TEXT, 1, False)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    columns, rows = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy")
    inputs["image_position_ids"] = torch.stack([columns, rows], -1).reshape(1, 16, 2)
    inputs["pixel_values"] = torch.rand(1, 16, 48, generator=torch.Generator().manual_seed(1))
    return zoo.Case(zoo.make("Gemma4ForConditionalGeneration", config), inputs)
