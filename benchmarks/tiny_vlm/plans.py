"""What is trained on, when, and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .album import Recipe
from .model import Sizes

KINDS = ("which", "what", "needle", "read", "clip")
"""Tasks, in the order in which batches number them."""

MIXED = Recipe(numbers=0.04, pages=0.02)

ALBUMS = {MIXED: 0.88, Recipe(numbers=0.4, pages=0.2): 0.07, Recipe(clip=True): 0.05}
"""Kinds of albums, and the share of each."""


@dataclass(frozen=True)
class Rates:
    """Learning rates of the parts."""

    vision: float
    connector: float
    change: float


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        name: what is learnt.
        share: of the time, or of the steps.
        rates: at its start, behind the warm-up.
        last: factor of the rates at its end; a cosine in between.
        lengths: tokens of a row, and the share of batches with such rows. Empty: single tiles
            without the language model.
        albums: what rows are of.
        warmup: steps at its start in which rates grow.
    """

    name: str
    share: float
    rates: Rates
    last: float
    lengths: Mapping[int, float] = field(default_factory=dict)
    albums: Mapping[Recipe, float] = field(default_factory=lambda: ALBUMS)
    warmup: int = 30


@dataclass(frozen=True)
class Plan:
    """A whole training.

    Attributes:
        sizes: of the model.
        stages: one after the other.
        tokens: of a batch.
        tiles: of a batch of single tiles.
        replay: rows and tokens of prose in each batch, on which the model shall stay as it was.
        things: how many things there are; None: all of the pack.
        seed: everything is drawn from it.
    """

    sizes: Sizes
    stages: tuple[Stage, ...]
    tokens: int
    tiles: int
    replay: tuple[int, int]
    things: int | None = None
    seed: int = 0


SEARCHED = {512: 0.05, 1024: 0.15, 2048: 0.25, 4096: 0.45, 8192: 0.1}
"""Tokens of a row in the last stage."""

FULL = Plan(
    Sizes(),
    (
        Stage("see", 0.12, Rates(3e-4, 3e-4, 0.0), 0.02, warmup=200),
        Stage("name", 0.13, Rates(2e-4, 5e-4, 6e-4), 0.8, {256: 0.6, 512: 0.4}),
        Stage("find", 0.2, Rates(2e-4, 4e-4, 6e-4), 0.8, {512: 0.2, 1024: 0.5, 2048: 0.3}),
        Stage("search", 0.55, Rates(2e-4, 4e-4, 5e-4), 0.02, SEARCHED),
    ),
    tokens=32768, tiles=2048, replay=(2, 512),
)  # fmt: skip
"""For one H100 in 20 minutes."""

MORE = Plan(
    Sizes(), (Stage("search", 1.0, Rates(1.5e-4, 3e-4, 5e-4), 0.02, SEARCHED, warmup=20),),
    tokens=32768, tiles=2048, replay=(2, 512), seed=1,
)  # fmt: skip
"""To go on from an adapter: only the last stage, with other samples."""

TOY = Plan(
    Sizes(hidden=128, inner=512, layers=4, heads=4, rank=8),
    (
        Stage("see", 0.35, Rates(1e-3, 1e-3, 0.0), 0.1, warmup=5),
        Stage("name", 0.65, Rates(3e-4, 1e-3, 1e-3), 0.1, {160: 1.0}, {Recipe(): 1.0}, 5),
    ),
    tokens=320, tiles=64, replay=(1, 16), things=8,
)  # fmt: skip
"""For one core of a processor in ten minutes: 8 things, at most 3 images a row."""

PLANS = {"full": FULL, "more": MORE, "toy": TOY}
