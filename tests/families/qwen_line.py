"""Images of any size as a row of patches, rotary positions of rows and columns: Qwen-VL's kin."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from .. import versions, zoo
from ..zoo import IMAGE
from .registry import TEXT, family
from .text import LATENT

GRID = 4
"""Patches on each side of the image; four of them make a token."""


def prompt(patch: int = 14, frames: int = 2) -> dict[str, Tensor]:
    """A prompt with one image, every patch of it repeated for ``frames``."""
    inputs = zoo.prompt(GRID**2 // 4, TEXT, 1, False, start=(1, IMAGE + 2))
    noise = torch.Generator().manual_seed(1)
    inputs["pixel_values"] = torch.randn(GRID**2, 3 * frames * patch**2, generator=noise)
    inputs["image_grid_thw"] = torch.tensor([[1, GRID, GRID]])
    inputs.update(versions.token_types(inputs["input_ids"] == IMAGE))
    return inputs


def rope(sections: tuple[int, ...] = (2, 3, 3), **changes: Any) -> dict[str, Any]:
    """Rotary positions that take turns between time, row and column."""
    base = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return versions.rope({**base, **changes})


def qwen(name: str, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    """A configuration of the Qwen line."""
    return getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2, vision_end_token_id=IMAGE + 3,
    )  # fmt: skip


def glm(name: str, text: dict[str, Any]) -> Any:
    """A configuration of the GLM line."""
    vision = dict(
        depth=1, hidden_size=32, out_hidden_size=64, num_heads=2, patch_size=14, image_size=56,
        intermediate_size=48,
    )  # fmt: skip
    return getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=IMAGE + 1,
        image_start_token_id=IMAGE + 2, image_end_token_id=IMAGE + 3,
        video_start_token_id=IMAGE + 4, video_end_token_id=IMAGE + 5,
    )  # fmt: skip


VISION: dict[str, Any] = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=48)
VISION3: dict[str, Any] = dict(
    **VISION, out_hidden_size=64, patch_size=16, num_position_embeddings=16
)


@family
def qwen2_vl() -> zoo.Case:
    vision = dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2, patch_size=14, mlp_ratio=2)
    config = qwen("Qwen2VL", zoo.text_config(**rope()), vision)
    return zoo.Case(zoo.make("Qwen2VLForConditionalGeneration", config), prompt())


@family
def qwen2_5_vl() -> zoo.Case:
    vision = dict(
        **VISION, out_hidden_size=64, patch_size=14, window_size=28, fullatt_block_indexes=[0]
    )
    config = qwen("Qwen2_5_VL", zoo.text_config(**rope()), vision)
    return zoo.Case(zoo.make("Qwen2_5_VLForConditionalGeneration", config), prompt())


@family
def qwen3_vl() -> zoo.Case:
    """Features of its vision layers are added between layers of the decoder, too."""
    text = zoo.text_config(head_dim=16, **rope((4, 2, 2), mrope_interleaved=True))
    config = qwen("Qwen3VL", text, dict(VISION3, deepstack_visual_indexes=[0]))
    return zoo.Case(zoo.make("Qwen3VLForConditionalGeneration", config), prompt(16))


@family
def qwen3_5() -> zoo.Case:
    """Every other layer is a recurrent one."""
    text = zoo.text_config(
        head_dim=16, linear_conv_kernel_dim=4, linear_key_head_dim=16, linear_value_head_dim=16,
        linear_num_key_heads=2, linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"],
        **rope((2, 1, 1), partial_rotary_factor=0.5, mrope_interleaved=True),
    )  # fmt: skip
    config = qwen("Qwen3_5", text, VISION3)
    return zoo.Case(zoo.make("Qwen3_5ForConditionalGeneration", config), prompt(16))


@family
def glm4v() -> zoo.Case:
    config = glm("Glm4v", zoo.text_config(**rope()))
    return zoo.Case(zoo.make("Glm4vForConditionalGeneration", config), prompt())


@family
def glm_ocr() -> zoo.Case:
    config = glm("GlmOcr", zoo.text_config(head_dim=16, **rope()))
    return zoo.Case(zoo.make("GlmOcrForConditionalGeneration", config), prompt())


@family
def ernie4_5_vl_moe() -> zoo.Case:
    text = zoo.text_config(
        moe_intermediate_size=[32, 16], moe_k=2, moe_num_experts=4, moe_num_shared_experts=1,
        mlp_layer_types=["dense", "sparse"], **rope((3, 3, 2)),
    )  # fmt: skip
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config=text, vision_config=dict(VISION, patch_size=14), image_token_id=IMAGE,
        video_token_id=IMAGE + 1, image_start_token_id=IMAGE + 2, image_end_token_id=IMAGE + 3,
        video_start_token_id=IMAGE + 4, video_end_token_id=IMAGE + 5,
    )  # fmt: skip
    inputs = prompt(frames=1)
    inputs["moe_mm_token_type_ids"] = inputs["mm_token_type_ids"].clone()
    return zoo.Case(zoo.make("Ernie4_5_VLMoeForConditionalGeneration", config), inputs)


@family
def paddleocr_vl() -> zoo.Case:
    text = zoo.text_config(head_dim=16, **rope())
    config = qwen("PaddleOCRVL", text, zoo.vision_config(image_size=56, num_hidden_layers=1))
    inputs = prompt(frames=1)
    inputs["pixel_values"] = inputs["pixel_values"].view(-1, 3, 14, 14)
    return zoo.Case(zoo.make("PaddleOCRVLForConditionalGeneration", config), inputs)


@family
def video_llama_3() -> zoo.Case:
    config = transformers.VideoLlama3Config(
        text_config=transformers.Qwen2Config(**zoo.text_config()), image_token_id=IMAGE,
        vision_config=zoo.vision_config(num_hidden_layers=1), video_token_id=IMAGE + 1,
    )  # fmt: skip
    inputs = prompt(frames=1)
    del inputs["mm_token_type_ids"]
    inputs["image_merge_sizes"] = torch.tensor([2])
    return zoo.Case(zoo.make("VideoLlama3ForConditionalGeneration", config), inputs)


@family
def exaone4_5() -> zoo.Case:
    text = zoo.text_config(
        model_type="exaone4", sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    vision = dict(
        VISION, out_hidden_size=64, patch_size=14, window_size=28, fullatt_block_indexes=[0],
        num_key_value_heads=2,
    )  # fmt: skip
    config = transformers.Exaone4_5_Config(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=IMAGE + 1
    )
    inputs = prompt()
    del inputs["mm_token_type_ids"]
    return zoo.Case(zoo.make("Exaone4_5_ForConditionalGeneration", config), inputs)


@family
def kimi_k25() -> zoo.Case:
    vision = dict(
        patch_size=14, pos_emb_height=4, pos_emb_width=4, num_attention_heads=2,
        num_hidden_layers=1, hidden_size=32, intermediate_size=48,
    )  # fmt: skip
    config = transformers.Kimi_K25Config(
        text_config=transformers.DeepseekV3Config(**zoo.text_config(**LATENT)),
        vision_config=vision, projection_hidden_size=32, image_token_id=IMAGE,
        video_token_id=IMAGE + 1, vision_start_token_id=IMAGE + 2, vision_end_token_id=IMAGE + 3,
    )  # fmt: skip
    inputs = prompt(frames=1)
    del inputs["mm_token_type_ids"]
    inputs["pixel_values"] = inputs["pixel_values"].view(-1, 3, 14, 14)
    return zoo.Case(zoo.make("Kimi_K25ForConditionalGeneration", config), inputs)
