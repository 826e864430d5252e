"""What the benchmark asks of a method: to prefill prompts, and to predict what follows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor

from .rivals.base import RECENT, SINKS, Layer, Rival, Size
from .subject import Inputs, Prompts, Subject


class Unavailable(Exception):
    """A method cannot run here; says why."""


@dataclass(frozen=True)
class Setting:
    """What a method is started with.

    Attributes:
        subject: the model.
        prompts: calibration prompts, int64 ``[C, S]`` with S the longest context.
        following: the most tokens that follow a context.
        inner: option ``inner`` of the backend.
        contexts: lengths that contexts have in this run, whichever are left to measure.
    """

    subject: Subject
    prompts: Tensor
    following: int
    inner: str
    contexts: tuple[int, ...]

    @property
    def many_lengths(self) -> bool:
        """Whether contexts have more than one length."""
        return len(self.contexts) > 1

    @property
    def longest(self) -> int:
        """Tokens of the longest context with what follows it."""
        return self.prompts.shape[1] + self.following

    @property
    def learnt_from(self) -> int:
        """Tokens of the one calibration prompt that all cells "from the first prompt" learn from.

        Codes reach twice as far as the longest prompt that they were fitted on. So it is as long as
        the shortest context from which they reach the end of the longest one.
        """
        return min((c for c in self.contexts if 2 * c >= self.longest), default=max(self.contexts))

    def calibration(self, length: int) -> list[Inputs]:
        """Prompts of about so many tokens to fit on, one by one."""
        return [{"input_ids": row[None]} for row in self.prompts[:, :length]]


@dataclass(frozen=True)
class Sizes:
    """Bytes of a method's cache.

    Attributes:
        ratio: 16-bit dense bytes of the coded tokens over their coded bytes; per-token gains,
            scales and tokens kept exact beyond the common ones are counted.
        whole_ratio: the same of the whole cache, common exact tokens and slack included.
        token_bytes: coded bytes of a token, keys and values of all layers.
        model_bytes: what belongs to the model, not to a sequence.
    """

    ratio: float
    whole_ratio: float
    token_bytes: float
    model_bytes: int


class Runner(Protocol):
    """A method at work."""

    def prefill(self, prompts: Prompts) -> Any:
        """Make the coded cache of some prompts."""

    def follow(self, cache: Any, ids: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of ``ids [B, T]`` behind the context; ``cache`` stays as it is."""

    def sizes(self, cache: Any) -> Sizes:
        """Bytes of a cache that :meth:`prefill` made."""

    def notes(self) -> dict[str, Any]:
        """What else should be known of the run."""


class RivalRunner:
    """Codes the dense cache of a prefill, then runs the stock model with what the code gives.

    Args:
        subject: the model.
        rival: the code.
        piece: how many of the tokens that follow go through the model at once; None: all of them,
            as they did for the reference.
    """

    def __init__(self, subject: Subject, rival: Rival, piece: int | None = None) -> None:
        self.subject = subject
        self.rival = rival
        self.piece = piece

    def prefill(self, prompts: Prompts) -> Any:
        """The coded keys and values of each layer, and the length of the prompts."""
        return [self._coded(layer) for layer in prompts.layers], prompts.length

    def _coded(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Coded in float32: only what a code gives back is rounded to the model's dtype."""
        exact = Layer(*(getattr(layer, field.name).float() for field in fields(layer)))
        k, v = self.rival.code(exact)
        return k.to(layer.k.dtype), v.to(layer.v.dtype)

    def follow(self, cache: Any, ids: Tensor) -> Tensor:
        """The tokens see the coded context, and each other exactly."""
        kv, length = cache
        return self.subject.follow(kv, length, ids, self.piece)

    def sizes(self, cache: Any) -> Sizes:
        """By the rival's formula."""
        heads, dim, length = self.subject.heads, self.subject.dim, cache[1]
        size = Size(length - SINKS - RECENT, heads, dim)
        per_token = self.rival.coded_bytes(size) * self.subject.layers / size.tokens
        return Sizes(
            self.rival.ratio(size), self.rival.whole_ratio(length, heads, dim), per_token, 0
        )

    def notes(self) -> dict[str, Any]:
        """Nothing."""
        return {}
