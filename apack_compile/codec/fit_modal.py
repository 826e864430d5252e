"""Two codes for each side of a layer: fitted by themselves, each on its kind of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .bits import CLASSES
from .code import Code
from .fit import Evidence, fit_transform
from .kinds import TEXT, VISUAL, rest
from .layout import PARTS
from .modal import ModalLayout, joined
from .recipe import Recipe
from .tiered import TIERS, mean_bits
from .transform import TransformLayout

FEW, MORE = 2, 3
"""Pairs of layouts of the finer and of the coarser code, to which they matter more.

Any two may meet in a layer: at most six pairs of both. (SmolLM2 at 16x: the distortion expected is
0.020 with two pairs, 0.015 with three, 0.014 with six.)
"""

FULL = 16 / mean_bits(CLASSES[0], TIERS)
"""At ratios up to this, of the tokens that stay, tiers leave bytes over: there is nothing more to
buy than 8 bits of every component."""


def fit_modal(
    layers: Sequence[Evidence],
    dims: tuple[int, int],
    recipe: Recipe,
    reach: int,
    layouts: Sequence[tuple[ModalLayout, ModalLayout]] | None = None,
) -> list[tuple[Code, Code]]:
    """Codes for K and V of layers of one shape, with a budget for each kind of tokens.

    Args:
        layers, dims, reach: as for :func:`~apack_compile.codec.fit.fit_transform`.
        recipe: its ``visual_ratio`` holds for visual tokens of all layers together, its ``ratio``
            for text. Only visual tokens are dropped; a kind whose ratio is no more than
            :data:`FULL` has no tiers.
        layouts: of each layer, to be kept; None: they are chosen.

    Raises:
        ValueError: no code is that small.
    """

    def fitted(kind: int) -> list[tuple[Code, Code]]:
        ratio = recipe.visual_ratio if kind == VISUAL else recipe.ratio
        mine = [replace(layer, kind=kind) for layer in layers]
        alone = replace(
            recipe, ratio=ratio, visual_ratio=0.0, evict=recipe.evict if kind == VISUAL else 0.0
        )
        stays = 1 - alone.evicted / PARTS  # of the bytes that a token would have
        alone = replace(alone, tiers=recipe.tiers and ratio * stays > FULL)
        most = MORE if ratio > min(recipe.ratio, recipe.visual_ratio) else FEW
        return fit_transform(mine, dims, alone, reach, _of_kind(layouts, kind), most)

    codes = []
    for layer, visual, text in zip(layers, fitted(VISUAL), fitted(TEXT), strict=True):
        counts = 1.0, 0.0
        if layer.visual is not None:
            words = rest(layer.moments, layer.visual)
            counts = float(words.count), float(layer.visual.count)
        (k, v), (k_text, v_text) = visual, text
        codes.append((joined(k, k_text, counts), joined(v, v_text, counts)))
    return codes


def _of_kind(
    layouts: Sequence[tuple[ModalLayout, ModalLayout]] | None, kind: int
) -> list[tuple[TransformLayout, TransformLayout]] | None:
    if layouts is None:
        return None
    return [(k.visual, v.visual) if kind == VISUAL else (k.text, v.text) for k, v in layouts]
