"""Tiny random-weight models, one function a family: hidden 64, 2 layers, 4 query and 2 KV heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from . import versions
from .plain import VOCAB, PlainDecoder, plain_decoder, plain_generate, plain_masks

__all__ = ["PlainDecoder", "plain_decoder", "plain_generate", "plain_masks"]

IMAGE = 200


@dataclass
class Case:
    """A model, the keyword arguments of its prefill, and the length of the prompt."""

    model: Any
    inputs: dict[str, Any]


def text_config(**changes: Any) -> dict[str, Any]:
    base = dict(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return {**base, **changes}


def vision_config(**changes: Any) -> dict[str, Any]:
    base = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_channels=3, image_size=28, patch_size=14,
    )  # fmt: skip
    return {**base, **changes}


def prompt(
    images: int, text: int, batch: int, padded: bool, start: tuple[int, ...] = (1,)
) -> dict[str, Tensor]:
    """``start``, image tokens, text; with ``padded`` row 0 begins with five padding tokens."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for row in range(batch):
        pad = 5 if padded and row == 0 else 0
        words = torch.randint(10, 190, (text - pad,), generator=generator)
        head = torch.tensor([0] * pad + list(start))
        rows.append(torch.cat([head, torch.full((images,), IMAGE), words]))
    ids = torch.stack(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def make(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def llama(batch: int = 1, padded: bool = False, text: int = 90, **changes: Any) -> Case:
    model = make("LlamaForCausalLM", transformers.LlamaConfig(**text_config(**changes)))
    return Case(model, prompt(0, text, batch, padded))


def picture(batch: int, side: int) -> Tensor:
    """Noise ``[B, 3, side, side]``."""
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def llava(batch: int = 1, padded: bool = False, text: int = 90, side: int = 28) -> Case:
    patches = (side // 14) ** 2
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text_config()),
        vision_config=transformers.CLIPVisionConfig(**vision_config(image_size=side)),
        image_token_index=IMAGE, image_seq_length=patches,
    )  # fmt: skip
    inputs = {**prompt(patches, text, batch, padded), "pixel_values": picture(batch, side)}
    return Case(make("LlavaForConditionalGeneration", config), inputs)


def internvl(batch: int = 1, padded: bool = False, text: int = 90) -> Case:
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**text_config()),
        vision_config=transformers.InternVLVisionConfig(
            **vision_config(image_size=[28, 28], patch_size=[7, 7])
        ),
        image_token_id=IMAGE, image_seq_length=4,
    )  # fmt: skip
    inputs = {**prompt(4, text, batch, padded), "pixel_values": picture(batch, 28)}
    return Case(make("InternVLForConditionalGeneration", config), inputs)


def paligemma(batch: int = 1, padded: bool = False, text: int = 90) -> Case:
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**text_config(head_dim=16)),
        vision_config=transformers.SiglipVisionConfig(
            **vision_config(projection_dim=64, vision_use_head=False)
        ),
        image_token_index=IMAGE, projection_dim=64, hidden_size=64,
    )  # fmt: skip
    inputs = prompt(4, text, batch, padded)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    inputs["pixel_values"] = picture(batch, 28)
    return Case(make("PaliGemmaForConditionalGeneration", config), inputs)


def gemma3(batch: int = 1, padded: bool = False, text: int = 90) -> Case:
    layers = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(
            **text_config(num_hidden_layers=4, head_dim=16, layer_types=layers),
            query_pre_attn_scalar=16, sliding_window=8,
        ),
        vision_config=transformers.SiglipVisionConfig(
            **vision_config(image_size=56, vision_use_head=False)
        ),
        image_token_index=IMAGE, boi_token_index=IMAGE + 1, eoi_token_index=IMAGE + 2,
        mm_tokens_per_image=4,
    )  # fmt: skip
    inputs = prompt(4, text, batch, padded)
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    inputs["pixel_values"] = picture(batch, 56)
    return Case(make("Gemma3ForConditionalGeneration", config), inputs)


def aria(batch: int = 1, padded: bool = False, text: int = 90) -> Case:
    """Its experts break every layer into graphs of its own."""
    config = transformers.AriaConfig(
        text_config=transformers.AriaTextConfig(
            **text_config(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
        ),
        vision_config=transformers.Idefics3VisionConfig(**vision_config()),
        image_token_index=IMAGE, projector_patch_to_query_dict={4: 2},
    )  # fmt: skip
    inputs = {**prompt(2, text, batch, padded), "pixel_values": picture(batch, 28)}
    return Case(make("AriaForConditionalGeneration", config), inputs)


def qwen2_vl(batch: int = 1, padded: bool = False, text: int = 90, grid: int = 4) -> Case:
    """Four of the ``grid x grid`` patches make a token."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2VLConfig(
        text_config=text_config(**versions.rope(rope)),
        vision_config=dict(
            depth=2, embed_dim=32, hidden_size=64, num_heads=2, patch_size=14, mlp_ratio=2
        ),
        image_token_id=IMAGE, video_token_id=IMAGE + 1, vision_start_token_id=IMAGE + 2,
        vision_end_token_id=IMAGE + 3,
    )  # fmt: skip
    inputs = prompt(grid**2 // 4, text, batch, padded, start=(1, IMAGE + 2))
    generator = torch.Generator().manual_seed(1)
    inputs["pixel_values"] = torch.randn(grid**2 * batch, 3 * 2 * 14 * 14, generator=generator)
    inputs["image_grid_thw"] = torch.tensor([[1, grid, grid]] * batch)
    inputs.update(versions.token_types(inputs["input_ids"] == IMAGE))
    return Case(make("Qwen2VLForConditionalGeneration", config), inputs)


def smolvlm(batch: int = 1, padded: bool = False, text: int = 90, family: str = "SmolVLM") -> Case:
    """SmolVLM, or Idefics3, from which it comes."""
    config = getattr(transformers, f"{family}Config")(
        text_config=transformers.LlamaConfig(**text_config()), image_token_id=IMAGE,
        scale_factor=2, pad_token_id=0, vision_config=vision_config(image_size=56),
    )  # fmt: skip
    inputs = {**prompt(4, text, batch, padded), "pixel_values": picture(batch, 56)[:, None]}
    return Case(make(f"{family}ForConditionalGeneration", config), inputs)


def idefics3(batch: int = 1, padded: bool = False, text: int = 90) -> Case:
    return smolvlm(batch, padded, text, "Idefics3")
