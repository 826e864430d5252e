"""What is read of the functions of flex_attention: steps, and what becomes of scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

aten = torch.ops.aten

ONE = (1, 1, 1, 1)

ROUNDED = aten.div.Tensor_mode
"""Takes as its third argument how it rounds."""

INDICES = 4
"""Of a score, b, h, q and k: results -4 to -1."""


@dataclass(frozen=True)
class Ref:
    """The result of a step of a program, a tensor that broadcasts to ``[B, H, Q, S]``."""

    step: int


@dataclass(frozen=True)
class Step:
    """A call.

    Attributes:
        target: what is called.
        args: results of steps, nodes of the Dynamo graph, constants.
        kinds: types of the arguments, for 1, 1.0 and True are equal.
    """

    target: OpOverload
    args: tuple[Any, ...]
    kinds: tuple[type, ...]


@dataclass(frozen=True)
class Scores:
    """Scores s of which a function makes ``cap tanh(factor s) + added`` where they are seen.

    Attributes:
        factor: of the scores.
        cap: 0: there is no tanh.
        added: a tensor in the dtype that scores are computed in, or None.
        seen: bool: others become -inf; or None.
    """

    factor: float = 1.0
    cap: float = 0.0
    added: Ref | None = None
    seen: Ref | None = None


class Unread(Exception):
    """A function does what is not known here; says what."""
