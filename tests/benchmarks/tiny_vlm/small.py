"""A pack of random icons and a decoder of two layers, behind the real tokenizer."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from benchmarks.tiny_vlm.model import Sizes, build
from benchmarks.tiny_vlm.pack import Pack
from benchmarks.tiny_vlm.plans import Plan, Rates, Stage
from benchmarks.tiny_vlm.prompt import Prompter
from benchmarks.tiny_vlm.sources import CELL, CHARACTERS, ICON
from benchmarks.tiny_vlm.tiles import Painter

from ... import zoo
from ..tiny import tokenizer

SIZES = Sizes(hidden=32, inner=64, layers=1, heads=2, rank=2)

PLAN = Plan(
    SIZES,
    (
        Stage("see", 0.5, Rates(1e-3, 1e-3, 0.0), 0.1, warmup=2),
        Stage("name", 0.5, Rates(1e-3, 1e-3, 1e-3), 0.1, {256: 0.5, 384: 0.5}, warmup=2),
    ),
    tokens=768, tiles=8, replay=(1, 16),
)  # fmt: skip


@cache
def pack() -> Pack:
    generator = np.random.default_rng(0)
    icons = generator.integers(0, 256, (40, ICON, ICON, 4), np.uint8)
    atlas = generator.integers(0, 256, (2, len(CHARACTERS), *CELL), np.uint8)
    nouns = ("cat", "dog", "sun", "tree", "fish", "key", "drum", "boat", "star", "leaf")
    names = tuple(f"{size} {noun}" for size in ("big", "old", "new", "odd") for noun in nouns)
    return Pack(icons, names, 30, atlas)


@cache
def painter() -> Painter:
    return Painter(pack())


@cache
def prompter() -> Prompter:
    return Prompter(tokenizer())


def decoder() -> Any:
    torch.manual_seed(1)
    return zoo.llama(vocab_size=49152, tie_word_embeddings=True).model


def model() -> Any:
    """A model whose changes are not zero."""
    made = build(decoder(), tokenizer(), SIZES)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if name.endswith("up"):
                value.normal_(std=0.1)
    return made
