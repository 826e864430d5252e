"""An album of images, and questions about it, as inputs of the small vision-language model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import smollm2  # noqa: F401  (first: it keeps transformers off the network)
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.tiny_vlm import adapter, sample
from benchmarks.tiny_vlm.album import Question
from benchmarks.tiny_vlm.forward import pixels
from benchmarks.tiny_vlm.prompt import Prompter

FOUND, NAMED = 11, 31
"""Images that are asked about, from 0: which one it is, and what it shows."""


def load() -> tuple[Any, Any]:
    """The model and its tokenizer.

    Raises:
        FileNotFoundError: the adapter is not there.
    """
    return adapter.load()


def questions(album: sample.Sample) -> list[Question]:
    """Some questions with their answers: about two drawings, and all that is printed."""
    return [album.which(FOUND), *(album.what(image) for image in (NAMED, *album.printed))]


def inputs(tokenizer: Any, album: sample.Sample) -> Iterator[tuple[Question, dict[str, Any]]]:
    """Each question, and the inputs of ``generate`` for it: all images, then the question."""
    prompter = Prompter(tokenizer)
    tiles = pixels(torch.from_numpy(album.tiles.copy())[None], torch.float32)
    for question in questions(album):
        ids = prompter.album(len(album.tiles)) + prompter.question(question.text)
        prompt = torch.tensor([ids])  # [1, S]
        mask = torch.ones_like(prompt)
        yield question, {"input_ids": prompt, "attention_mask": mask, "pixel_values": tiles}
