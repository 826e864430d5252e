"""Families by name, and how each is decoded greedily."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import zoo

TEXT = 72
"""Words of a prompt, images not counted: a fit wants 64 tokens beside the sinks."""


@dataclass(frozen=True)
class Decoded:
    """What greedy decoding gave.

    Attributes:
        tokens: all that was generated, prompt included where the model returns it.
        logits: of every step ``[B, V]``.
        cache: the cache, which the report measures while it is alive.
    """

    tokens: Tensor
    logits: tuple[Tensor, ...]
    cache: Any


Build = Callable[[], zoo.Case]
Decode = Callable[[Any, Mapping[str, Any], int], Decoded]


def by_generate(model: Any, inputs: Mapping[str, Any], steps: int) -> Decoded:
    """As Hugging Face decodes; what it decodes is text."""
    out = model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
        output_logits=True, suppress_tokens=[zoo.IMAGE],
    )  # fmt: skip
    return Decoded(out.sequences, out.logits, out.past_key_values)


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        build: makes a tiny model and its prompt.
        decode: decodes greedily.
    """

    build: Build
    decode: Decode = by_generate


FAMILIES: dict[str, Family] = {}


def family(build: Build) -> Build:
    """Register a builder under its own name."""
    register(build.__name__, build)
    return build


def register(name: str, build: Build, decode: Decode = by_generate) -> None:
    """Register a builder."""
    assert name not in FAMILIES
    FAMILIES[name] = Family(build, decode)


def make(name: str) -> zoo.Case:
    """A family's model and prompt."""
    case = FAMILIES[name].build()
    untie(case.model)
    enlarge(case.model)
    for module in case.model.modules():
        if isinstance(module, transformers.GenerationMixin):
            settings = module.generation_config
            settings.eos_token_id, settings.pad_token_id = None, 0
            settings.bos_token_id = 1
    return case


def untie(model: nn.Module) -> None:
    """Give heads that share the table of embeddings weights of their own.

    With random weights they would predict the token that they have just seen, for ever.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in tables:
            module.weight = nn.Parameter(module.weight.clone())


def enlarge(model: nn.Module) -> None:
    """Give products with weights results as large as what goes in, in fewer directions.

    With the small weights of a fresh model attention looks everywhere alike, and hardly anything
    depends on what it finds. Keys and values of trained models lie in few directions, too: noise
    in all of them cannot be coded in two bits.
    """
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fill(module.weight, generator)
        elif isinstance(module, Conv1D):
            fill(module.weight.T, generator)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5, generator=generator)


def fill(weight: Tensor, generator: torch.Generator) -> None:
    """Random weights ``[out, in]`` that count some inputs more than others."""
    sizes = torch.arange(1, weight.shape[1] + 1) ** -0.5
    weight.data.normal_(generator=generator).mul_(sizes / sizes.norm())
