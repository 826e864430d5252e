"""Idefics, SmolVLM and LFM2-VL: towers that mask their patches."""

from __future__ import annotations

import torch
import transformers

from .. import zoo
from ..zoo import IMAGE
from .registry import TEXT, family


@family
def idefics() -> zoo.Case:
    """The decoder looks at the image by cross-attention, without a cache, at every step."""
    settings = zoo.text_config()
    del settings["num_key_value_heads"]
    config = transformers.IdeficsConfig(
        **settings, cross_layer_interval=1, use_resampler=False,
        vision_config=dict(
            embed_dim=32, image_size=28, intermediate_size=48, patch_size=14,
            num_hidden_layers=2, num_attention_heads=2,
        ),
    )  # fmt: skip
    inputs = zoo.prompt(0, TEXT, 1, False)
    inputs["pixel_values"] = zoo.picture(1, 28)[:, None]
    inputs["image_attention_mask"] = torch.ones(1, TEXT + 1, 1, dtype=torch.long)
    return zoo.Case(zoo.make("IdeficsForVisionText2Text", config), inputs)


@family
def idefics2() -> zoo.Case:
    """A perceiver brings the image to four tokens."""
    config = transformers.Idefics2Config(
        text_config=transformers.MistralConfig(**zoo.text_config(sliding_window=None)),
        vision_config=zoo.vision_config(image_size=56),
        perceiver_config=dict(
            hidden_size=64, resampler_n_latents=4, resampler_depth=1, resampler_n_heads=4,
            resampler_head_dim=16, num_key_value_heads=2,
        ),
        image_token_id=IMAGE,
    )  # fmt: skip
    inputs = {**zoo.prompt(4, TEXT, 1, False), "pixel_values": zoo.picture(1, 56)[:, None]}
    return zoo.Case(zoo.make("Idefics2ForConditionalGeneration", config), inputs)


@family
def idefics3() -> zoo.Case:
    return zoo.idefics3(text=TEXT)


@family
def smolvlm() -> zoo.Case:
    return zoo.smolvlm(text=TEXT)


@family
def lfm2_vl() -> zoo.Case:
    """The first layer of the decoder is a convolution, without attention."""
    text = zoo.text_config(layer_types=["conv", "full_attention"])
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_channels=3, patch_size=14, num_patches=16, vision_use_head=False,
    )  # fmt: skip
    config = transformers.Lfm2VlConfig(
        text_config=transformers.Lfm2Config(**text), image_token_id=IMAGE,
        vision_config=transformers.Siglip2VisionConfig(**vision), projector_hidden_size=64,
    )  # fmt: skip
    inputs = zoo.prompt(4, TEXT, 1, False)
    noise = torch.Generator().manual_seed(1)
    inputs["pixel_values"] = torch.randn(1, 16, 3 * 14 * 14, generator=noise)
    inputs["spatial_shapes"] = torch.tensor([[4, 4]])
    inputs["pixel_attention_mask"] = torch.ones(1, 16, dtype=torch.long)
    return zoo.Case(zoo.make("Lfm2VlForConditionalGeneration", config), inputs)
