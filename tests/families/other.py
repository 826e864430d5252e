"""Families with a way of their own to look at images, and experts."""

from __future__ import annotations

import torch
import transformers

from .. import versions, zoo
from ..zoo import IMAGE
from .registry import TEXT, family


@family
def mllama() -> zoo.Case:
    """Its middle layer looks at the image: keys and values come with the first prompt."""
    text = zoo.text_config(
        num_hidden_layers=3, cross_attention_layers=[1],
        **versions.rope({"rope_type": "default", "rope_theta": 10000.0}),
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1,
        attention_heads=2, vision_output_dim=64, image_size=28, patch_size=14, max_num_tiles=2,
        intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )  # fmt: skip
    config = transformers.MllamaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE
    )  # fmt: skip
    inputs = zoo.prompt(1, TEXT, 1, False)
    noise = torch.Generator().manual_seed(1)
    inputs["pixel_values"] = torch.randn(1, 1, 2, 3, 28, 28, generator=noise)
    inputs["aspect_ratio_ids"] = torch.ones(1, 1, dtype=torch.long)
    inputs["aspect_ratio_mask"] = torch.ones(1, 1, 2, dtype=torch.long)
    inputs["cross_attention_mask"] = torch.ones(1, TEXT + 2, 1, 2, dtype=torch.long)
    model = zoo.make("MllamaForConditionalGeneration", config)
    for name, gate in model.named_parameters():
        if name.endswith("_gate"):
            gate.data.fill_(1.0)  # closed in a fresh model
    return zoo.Case(model, inputs)


@family
def llama4() -> zoo.Case:
    """Layers that see chunks of 16 tokens, and layers without positions that see everything."""
    text = transformers.Llama4TextConfig(
        **zoo.text_config(
            head_dim=16, intermediate_size_mlp=96, num_local_experts=2, num_experts_per_tok=1,
            attention_chunk_size=16, moe_layers=[1], no_rope_layers=[1, 0],
            layer_types=["chunked_attention", "full_attention"],
        )
    )  # fmt: skip
    vision = transformers.Llama4VisionConfig(
        **zoo.vision_config(
            image_size=56, intermediate_size=128, vision_output_dim=32, projector_input_dim=32,
            projector_output_dim=32, pixel_shuffle_ratio=0.5,
        )
    )  # fmt: skip
    config = transformers.Llama4Config(
        text_config=text, vision_config=vision, image_token_index=IMAGE,
        boi_token_index=IMAGE + 1, eoi_token_index=IMAGE + 2,
    )  # fmt: skip
    inputs = {**zoo.prompt(4, TEXT, 1, False), "pixel_values": zoo.picture(1, 56)}
    return zoo.Case(zoo.make("Llama4ForConditionalGeneration", config), inputs)


@family
def aria() -> zoo.Case:
    """Its experts break every layer into graphs of its own."""
    return zoo.aria(text=TEXT)


@family
def fuyu() -> zoo.Case:
    """No tower: patches are projected and put among the words."""
    settings = zoo.text_config()
    del settings["num_key_value_heads"]
    config = transformers.FuyuConfig(
        **settings, image_size=28, patch_size=14, image_token_id=IMAGE,
        text_config=dict(model_type="persimmon", **settings),
    )  # fmt: skip
    inputs = zoo.prompt(4, TEXT, 1, False)
    noise = torch.Generator().manual_seed(1)
    inputs["image_patches"] = torch.randn(1, 4, 14 * 14 * 3, generator=noise)
    return zoo.Case(zoo.make("FuyuForCausalLM", config), inputs)


@family
def chameleon() -> zoo.Case:
    """Images become tokens of the vocabulary, by a tower with attention over pixels."""
    letters = "ABCDEFGHIJ"
    names = [f"IMGIMG{letters[i // 10]}{letters[i % 10]}Z" for i in range(16)]
    config = transformers.ChameleonConfig(
        **zoo.text_config(num_key_value_heads=4), image_token_id=IMAGE,
        vq_config=dict(
            embed_dim=8, num_embeddings=16, latent_channels=8, resolution=16, base_channels=32,
            channel_multiplier=[1, 2], num_res_blocks=1,
        ),
        vocabulary_map={"<image>": IMAGE, **{name: 220 + i for i, name in enumerate(names)}},
    )  # fmt: skip
    inputs = {**zoo.prompt(64, 20, 1, False), "pixel_values": zoo.picture(1, 16)}
    return zoo.Case(zoo.make("ChameleonForConditionalGeneration", config), inputs)


@family
def emu3() -> zoo.Case:
    """The same, with a tower for videos."""
    names = {f"<|visual token {i:06d}|>": 220 + i for i in range(16)}
    config = transformers.Emu3Config(
        text_config=zoo.text_config(attention_dropout=0.0),
        vq_config=dict(
            codebook_size=16, embed_dim=8, latent_channels=8, base_channels=32,
            channel_multiplier=[1, 2], num_res_blocks=1, attn_resolutions=[], hidden_size=64,
            temporal_downsample_factor=2,
        ),
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": 240, **names},
    )  # fmt: skip
    inputs = {**zoo.prompt(8 * 9, 20, 1, False), "pixel_values": zoo.picture(1, 16)}
    inputs["image_sizes"] = torch.tensor([[16, 16]])
    return zoo.Case(zoo.make("Emu3ForConditionalGeneration", config), inputs)


@family
def phi4_multimodal() -> zoo.Case:
    """A branch on the tokens splits its graphs; uncompiled, its tower computes other numbers."""
    config = transformers.Phi4MultimodalConfig(
        **zoo.text_config(original_max_position_embeddings=4096),
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            image_size=56, patch_size=14, crop_size=56, image_token_id=IMAGE, feature_layer=-2,
        ),
        audio_config=dict(
            hidden_size=32, intermediate_size=48, num_blocks=1, num_attention_heads=2,
            ext_pw_out_channel=32, depthwise_separable_out_channel=32, input_size=16,
            nemo_conv_channels=32, audio_token_id=IMAGE + 1, time_reduction=4,
        ),
    )  # fmt: skip
    inputs = zoo.prompt(13, TEXT, 1, False)  # two crops of 2 x 2 with line breaks, and one between
    noise = torch.Generator().manual_seed(1)
    inputs["image_pixel_values"] = torch.randn(1, 2, 3, 56, 56, generator=noise)
    inputs["image_sizes"] = torch.tensor([[56, 56]])
    inputs["image_attention_mask"] = torch.ones(1, 2, 4, 4)
    return zoo.Case(zoo.make("Phi4MultimodalForCausalLM", config), inputs)


@family
def git() -> zoo.Case:
    """Images are part of every sequence; attention is written out, in vision and in text."""
    settings = zoo.text_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    del settings["num_key_value_heads"]
    config = transformers.GitConfig(**settings, vision_config=zoo.vision_config())
    inputs = {**zoo.prompt(0, TEXT, 1, False), "pixel_values": zoo.picture(1, 28)}
    return zoo.Case(zoo.make("GitForCausalLM", config), inputs)
