"""A vision tower, a projector, and its tokens in the prompt of a language model: LLaVA's kin."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from .. import zoo
from ..zoo import IMAGE
from .registry import TEXT, family


def prompt(images: int) -> dict[str, Tensor]:
    """A prompt with ``images`` image tokens."""
    return zoo.prompt(images, TEXT, 1, False)


def llama() -> Any:
    return transformers.LlamaConfig(**zoo.text_config())


def qwen2() -> Any:
    return transformers.Qwen2Config(**zoo.text_config())


def mistral() -> Any:
    return transformers.MistralConfig(**zoo.text_config(head_dim=16, sliding_window=None))


def cohere2() -> Any:
    layers = ["sliding_attention", "full_attention"]
    return transformers.Cohere2Config(**zoo.text_config(sliding_window=16, layer_types=layers))


def clip() -> Any:
    return transformers.CLIPVisionConfig(**zoo.vision_config())


def siglip(side: int = 28, **changes: Any) -> Any:
    return transformers.SiglipVisionConfig(**zoo.vision_config(image_size=side, **changes))


def pixtral() -> Any:
    return transformers.PixtralVisionConfig(**zoo.vision_config(image_size=56, head_dim=16))


def tiles() -> dict[str, Tensor]:
    """An image in four tiles and as a whole: 4 x 4 tokens, four line breaks, 4 tokens."""
    noise = torch.randn(1, 5, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    return {**prompt(24), "pixel_values": noise, "image_sizes": torch.tensor([[56, 56]])}


@family
def llava() -> zoo.Case:
    return zoo.llava(text=TEXT)


@family
def llava_pixtral() -> zoo.Case:
    config = transformers.LlavaConfig(
        text_config=mistral(), vision_config=pixtral(), image_token_index=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_seq_length=16,
    )  # fmt: skip
    sizes = torch.tensor([[56, 56]])
    inputs = {**prompt(16), "pixel_values": zoo.picture(1, 56), "image_sizes": sizes}
    return zoo.Case(zoo.make("LlavaForConditionalGeneration", config), inputs)


@family
def llava_next() -> zoo.Case:
    config = transformers.LlavaNextConfig(
        text_config=llama(), vision_config=clip(), image_token_index=IMAGE,
        image_grid_pinpoints=[[56, 56]], image_seq_length=4,
    )  # fmt: skip
    return zoo.Case(zoo.make("LlavaNextForConditionalGeneration", config), tiles())


@family
def llava_next_video() -> zoo.Case:
    config = transformers.LlavaNextVideoConfig(
        text_config=llama(), vision_config=clip(), image_token_index=IMAGE,
        video_token_index=IMAGE + 1, image_grid_pinpoints=[[56, 56]], image_seq_length=4,
    )  # fmt: skip
    return zoo.Case(zoo.make("LlavaNextVideoForConditionalGeneration", config), tiles())


@family
def llava_onevision() -> zoo.Case:
    config = transformers.LlavaOnevisionConfig(
        text_config=qwen2(), vision_config=siglip(), image_token_index=IMAGE,
        video_token_index=IMAGE + 1, image_grid_pinpoints=[[56, 56]],
    )  # fmt: skip
    return zoo.Case(zoo.make("LlavaOnevisionForConditionalGeneration", config), tiles())


@family
def video_llava() -> zoo.Case:
    config = transformers.VideoLlavaConfig(
        text_config=llama(), vision_config=clip(), image_token_index=IMAGE,
        video_token_index=IMAGE + 1, image_seq_length=4, video_seq_length=8,
    )  # fmt: skip
    inputs = {**prompt(4), "pixel_values_images": zoo.picture(1, 28)}
    return zoo.Case(zoo.make("VideoLlavaForConditionalGeneration", config), inputs)


@family
def vipllava() -> zoo.Case:
    config = transformers.VipLlavaConfig(
        text_config=llama(), vision_config=clip(), image_token_index=IMAGE,
        vision_feature_layers=[-1, -2], image_seq_length=4,
    )  # fmt: skip
    inputs = {**prompt(4), "pixel_values": zoo.picture(1, 28)}
    return zoo.Case(zoo.make("VipLlavaForConditionalGeneration", config), inputs)


@family
def mistral3() -> zoo.Case:
    config = transformers.Mistral3Config(
        text_config=mistral(), vision_config=pixtral(), image_token_index=IMAGE,
        spatial_merge_size=2,
    )  # fmt: skip
    sizes = torch.tensor([[56, 56]])
    inputs = {**prompt(4), "pixel_values": zoo.picture(1, 56), "image_sizes": sizes}
    return zoo.Case(zoo.make("Mistral3ForConditionalGeneration", config), inputs)


@family
def internvl() -> zoo.Case:
    return zoo.internvl(text=TEXT)


@family
def got_ocr2() -> zoo.Case:
    """Its vision tower writes attention out, over three dimensions."""
    vision = transformers.GotOcr2VisionConfig(
        hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=64, patch_size=8, window_size=4, global_attn_indexes=[1], mlp_dim=48,
    )  # fmt: skip
    config = transformers.GotOcr2Config(
        text_config=qwen2(), vision_config=vision, image_token_index=IMAGE, image_seq_length=4
    )
    inputs = {**prompt(4), "pixel_values": zoo.picture(1, 64)}
    return zoo.Case(zoo.make("GotOcr2ForConditionalGeneration", config), inputs)


@family
def deepseek_vl() -> zoo.Case:
    config = transformers.DeepseekVLConfig(
        text_config=llama(), vision_config=siglip(vision_use_head=False), image_token_id=IMAGE
    )
    inputs = {**prompt(4), "pixel_values": zoo.picture(1, 28)}
    return zoo.Case(zoo.make("DeepseekVLForConditionalGeneration", config), inputs)


@family
def janus() -> zoo.Case:
    vision = transformers.JanusVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        mlp_ratio=2, projection_dim=64, num_image_tokens=4,
    )  # fmt: skip
    codes = transformers.JanusVQVAEConfig(
        embed_dim=8, num_embeddings=16, latent_channels=8, base_channels=32,
        channel_multiplier=[1, 2], num_res_blocks=1, projection_dim=64, image_token_embed_dim=64,
    )  # fmt: skip
    config = transformers.JanusConfig(
        text_config=llama(), vision_config=vision, vq_config=codes, image_token_id=IMAGE
    )
    inputs = {**prompt(4), "pixel_values": zoo.picture(1, 28)}
    return zoo.Case(zoo.make("JanusForConditionalGeneration", config), inputs)


@family
def aya_vision() -> zoo.Case:
    config = transformers.AyaVisionConfig(
        text_config=cohere2(), vision_config=siglip(56, vision_use_head=False),
        image_token_index=IMAGE, downsample_factor=2,
    )  # fmt: skip
    inputs = {**prompt(4), "pixel_values": zoo.picture(1, 56)}
    return zoo.Case(zoo.make("AyaVisionForConditionalGeneration", config), inputs)


@family
def cohere2_vision() -> zoo.Case:
    config = transformers.Cohere2VisionConfig(
        text_config=cohere2(), vision_config=siglip(56, vision_use_head=False),
        image_token_id=IMAGE, downsample_factor=2, alignment_intermediate_size=64,
    )  # fmt: skip
    inputs = {**prompt(4), "pixel_values": zoo.picture(1, 56)}
    return zoo.Case(zoo.make("Cohere2VisionForConditionalGeneration", config), inputs)


@family
def ovis2() -> zoo.Case:
    vision = zoo.vision_config(vocab_size=32, hidden_stride=1, num_visual_indicator_tokens=5)
    config = transformers.Ovis2Config(
        text_config=qwen2(), vision_config=transformers.Ovis2VisionConfig(**vision),
        image_token_id=IMAGE, vocab_size=zoo.VOCAB, hidden_size=64,
        visual_indicator_token_ids=[201, 202, 203, 204, 205],
    )  # fmt: skip
    inputs = {**prompt(4), "pixel_values": zoo.picture(1, 28)}
    return zoo.Case(zoo.make("Ovis2ForConditionalGeneration", config), inputs)
