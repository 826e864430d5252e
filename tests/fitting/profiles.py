"""Profiles made by hand: fitted on made-up tokens, of made-up weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from apack_compile.codec.rotation import Rotation
from apack_compile.fitting.file import SavedLayer, SavedProfile
from apack_compile.fitting.fingerprint import digests

from ..helpers import fitted_ref, modal_ref

OPTIONS = "('transform', ratio 4)"


def saved(layers: int = 2, options: str = OPTIONS) -> SavedProfile:
    """Layers of 2 heads of 8, every other one with a rotation."""
    weights = digests([torch.full((4,), float(i)) for i in range(layers + 3)])
    made = {"attentionpack": "0", "torch": "0", "time": "then"}
    each = tuple(saved_layer(i, weights[i]) for i in range(layers))
    return SavedProfile(options, tuple(weights), each, 200, 60, made)


def saved_layer(number: int, weight: str) -> SavedLayer:
    k, v = fitted_ref(gain=False).code, fitted_ref(gain=True).code
    if number == 1:
        v = modal_ref().code
    codes = replace(k, kinds=(0.25, 0.5)), v
    waves = torch.rand(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    rotation = Rotation(waves[0], 8, False, waves[1], 0.25) if number % 2 else None
    return SavedLayer(weight, (4,), f"layer.{number}", codes, rotation, 4096, "a reason")
