"""Families once more, with attention written out as products and a softmax."""

from __future__ import annotations

from functools import partial

from .. import zoo
from . import encoder_decoder, gemma_line, llava_line, own_generate, qwen_line, text  # noqa: F401
from .registry import FAMILIES, register

NAMES = ("llama", "gemma2", "opt", "t5", "llava", "qwen2_vl", "gemma3", "blip2")


def written_out(name: str) -> zoo.Case:
    """A family of that name, as ``attn_implementation="eager"`` runs it."""
    case = FAMILIES[name].build()
    case.model.set_attn_implementation("eager")
    return case


for _name in NAMES:
    register(f"{_name}, eager attention", partial(written_out, _name))
