"""An encoder, and a decoder that looks at it by cross-attention.

Its own cache grows from a long prompt of the decoder.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor

from .. import zoo
from ..zoo import IMAGE
from .registry import TEXT, family

T5: dict[str, Any] = dict(
    vocab_size=zoo.VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
    dropout_rate=0.0, decoder_start_token_id=1, pad_token_id=0, eos_token_id=None,
)  # fmt: skip
BART: dict[str, Any] = dict(
    vocab_size=zoo.VOCAB, d_model=64, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
    max_position_embeddings=256, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    decoder_start_token_id=1, forced_eos_token_id=None,
)  # fmt: skip


def words() -> Tensor:
    """What the decoder begins with."""
    return zoo.prompt(0, TEXT, 1, False)["input_ids"]


def two_prompts(images: int = 0) -> dict[str, Tensor]:
    """A short one for the encoder, a long one for the decoder."""
    return {**zoo.prompt(images, 10, 1, False), "decoder_input_ids": words()}


@family
def t5() -> zoo.Case:
    """Scores carry a bias by relative position, in place of a mask."""
    model = zoo.make("T5ForConditionalGeneration", transformers.T5Config(**T5))
    return zoo.Case(model, two_prompts())


@family
def bart() -> zoo.Case:
    model = zoo.make("BartForConditionalGeneration", transformers.BartConfig(**BART))
    return zoo.Case(model, two_prompts())


@family
def florence2() -> zoo.Case:
    vision = dict(
        depths=[1, 1], patch_size=[7, 3], patch_stride=[4, 2], patch_padding=[3, 1],
        patch_prenorm=[False, True], embed_dim=[16, 32], num_heads=[2, 2], num_groups=[2, 2],
        window_size=4, projection_dim=64, drop_path_rate=0.0, max_position_embeddings=10,
    )  # fmt: skip
    config = transformers.Florence2Config(
        text_config=transformers.BartConfig(**BART), vision_config=vision, image_token_id=IMAGE
    )
    inputs = {**two_prompts(17), "pixel_values": zoo.picture(1, 32)}
    return zoo.Case(zoo.make("Florence2ForConditionalGeneration", config), inputs)


@family
def t5gemma2() -> zoo.Case:
    """One attention over its own cache and the encoder's together."""
    text = zoo.text_config(
        head_dim=16, query_pre_attn_scalar=16, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    vision = zoo.vision_config(image_size=56, vision_use_head=False)
    encoder = dict(
        text_config=text, vision_config=dict(model_type="siglip_vision_model", **vision),
        image_token_index=IMAGE, boi_token_index=IMAGE + 1, eoi_token_index=IMAGE + 2,
        mm_tokens_per_image=4,
    )  # fmt: skip
    config = transformers.T5Gemma2Config(
        encoder=encoder, decoder=dict(text), image_token_index=IMAGE, eoi_token_index=IMAGE + 2
    )
    inputs = {**two_prompts(4), "pixel_values": zoo.picture(1, 56)}
    return zoo.Case(zoo.make("T5Gemma2ForConditionalGeneration", config), inputs)
