"""Families whose generate calls that of a model inside."""

from __future__ import annotations

from typing import Any

import transformers

from .. import zoo
from ..zoo import IMAGE
from .encoder_decoder import T5, words
from .registry import TEXT, family
from .text import OPT

FORMER: dict[str, Any] = dict(
    vocab_size=zoo.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=48, encoder_hidden_size=32, cross_attention_frequency=1,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
"""A Q-Former, which brings an image to four tokens."""


def with_former(name: str, text: Any) -> Any:
    """BLIP-2 or InstructBLIP."""
    config = getattr(transformers, f"{name}Config")(
        text_config=text.to_dict(), qformer_config=FORMER, vision_config=zoo.vision_config(),
        num_query_tokens=4, image_token_index=IMAGE,
    )  # fmt: skip
    return zoo.make(f"{name}ForConditionalGeneration", config)


@family
def blip2() -> zoo.Case:
    inputs = {**zoo.prompt(4, TEXT, 1, False), "pixel_values": zoo.picture(1, 28)}
    return zoo.Case(with_former("Blip2", transformers.OPTConfig(**OPT)), inputs)


@family
def blip2_t5() -> zoo.Case:
    inputs = {**zoo.prompt(4, 10, 1, False), "pixel_values": zoo.picture(1, 28)}
    inputs["decoder_input_ids"] = words()
    return zoo.Case(with_former("Blip2", transformers.T5Config(**T5)), inputs)


@family
def instructblip() -> zoo.Case:
    """The Q-Former reads the instruction, too."""
    inputs = {**zoo.prompt(4, TEXT, 1, False), "pixel_values": zoo.picture(1, 28)}
    inputs["qformer_input_ids"] = words()[:, :9]
    return zoo.Case(with_former("InstructBlip", transformers.OPTConfig(**OPT)), inputs)


@family
def kosmos2() -> zoo.Case:
    text = dict(
        vocab_size=zoo.VOCAB, embed_dim=64, layers=2, ffn_dim=96, attention_heads=4,
        max_position_embeddings=256, dropout=0.0, attention_dropout=0.0, pad_token_id=0,
        bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    config = transformers.Kosmos2Config(
        text_config=text, vision_config=zoo.vision_config(), latent_query_num=4
    )
    inputs = {**zoo.prompt(4, TEXT, 1, False), "pixel_values": zoo.picture(1, 28)}
    inputs["image_embeds_position_mask"] = (inputs["input_ids"] == IMAGE).long()
    return zoo.Case(zoo.make("Kosmos2ForConditionalGeneration", config), inputs)


@family
def blip() -> zoo.Case:
    """Captions: attention is written out, the image is looked at by cross-attention."""
    text = dict(
        vocab_size=zoo.VOCAB, hidden_size=64, encoder_hidden_size=32, intermediate_size=96,
        projection_dim=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=1, pad_token_id=0, sep_token_id=zoo.VOCAB - 1,
    )  # fmt: skip
    config = transformers.BlipConfig(
        text_config=text, vision_config=zoo.vision_config(projection_dim=32), projection_dim=32,
        image_text_hidden_size=32,
    )  # fmt: skip
    inputs = {**zoo.prompt(0, TEXT, 1, False), "pixel_values": zoo.picture(1, 28)}
    return zoo.Case(zoo.make("BlipForConditionalGeneration", config), inputs)
