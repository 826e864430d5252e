"""When a stage ends, and how large steps are until then."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .plans import Plan, Rates


@dataclass(frozen=True)
class Budget:
    """How long a whole training is: by the clock or, for the same result every time, in steps.

    Attributes:
        minutes: of training; None if ``steps`` counts.
        steps: of all stages together.
    """

    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("a budget is either minutes or steps")

    def done(self, share: float, seconds: float, steps: int) -> float:
        """How much of a stage is done, at least 0; 1 or more: all of it.

        Args:
            share: of the stage.
            seconds, steps: spent on the stage.
        """
        if self.minutes is not None:
            return seconds / (self.minutes * 60 * share)
        assert self.steps is not None
        return steps / max(round(self.steps * share), 1)


def rates(plan: Plan, stage: int, done: float, step: int) -> Rates:
    """Learning rates: a linear warm-up, then half a cosine down to the stage's last factor.

    Args:
        plan: of the training.
        stage: its number.
        done: how much of it is done.
        step: of the stage, from 0.
    """
    now = plan.stages[stage]
    fall = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    factor = (now.last + (1 - now.last) * fall) * min((step + 1) / now.warmup, 1.0)
    return Rates(
        *(rate * factor for rate in (now.rates.vision, now.rates.connector, now.rates.change))
    )
