"""The families that the backend is tested with; importing this registers all of them."""

from . import (
    encoder_decoder,
    gemma_line,
    idefics_line,
    llava_line,
    other,
    own_generate,
    plain,
    qwen_line,
    text,
    written_out,
)

__all__ = [
    "encoder_decoder",
    "gemma_line",
    "idefics_line",
    "llava_line",
    "other",
    "own_generate",
    "plain",
    "qwen_line",
    "text",
    "written_out",
]
