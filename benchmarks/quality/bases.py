"""Codes with bases of our choice, put on dense caches: a measurement, not what the backend does.

The codec's own functions fit and code, keys as attention sees them. The sensitivity of layers is
left out: every layer has the same bytes, and keys are weighted with the last queries. Bases differ
by the tokens that they were fitted on, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apack_compile.codec.code import Code
from apack_compile.codec.fit import Evidence, fit_transform
from apack_compile.codec.moments import Moments
from apack_compile.codec.recipe import Recipe

from .rivals.base import RECENT, SINKS, Layer, between, between_exact
from .runner import Sizes
from .subject import Prompts, Subject

Codes = list[tuple[Code, Code]]
"""Of the keys and the values of each layer."""


def sums(layers: Sequence[Layer], among: Tensor | None = None) -> list[Moments]:
    """Moments of each layer's cache; of some tokens alone, ``among [B, S]`` bool."""
    return [Moments.of(y.queries, y.k, y.v, None, sinks=SINKS, among=among) for y in layers]


def total(parts: Sequence[list[Moments]]) -> list[Moments]:
    """Moments of several prompts together."""
    first, *others = parts
    for more in others:
        first = [mine + theirs for mine, theirs in zip(first, more, strict=True)]
    return first


def codes(moments: Sequence[Moments], dim: int, ratio: float) -> Codes:
    """Codes fitted on moments, the same bytes for every layer."""
    layers = [Evidence(one) for one in moments]
    return fit_transform(layers, (dim, dim), Recipe(ratio), reach=1)


def basis_bytes(made: Codes) -> int:
    """Bytes of what codes are read back with, the mean and the basis, as 16-bit numbers."""
    params = [code.params for pair in made for code in pair]
    return sum(2 * (mean.numel() + synthesis.numel()) for mean, _, synthesis, *_ in params)


@dataclass
class BasisRunner:
    """Codes dense caches, then runs the stock model with what is left of them.

    Attributes:
        subject: the model.
        ratio: that codes are fitted for.
        text, visual: codes of tokens of each kind; None: they are fitted on each sequence itself,
            on both kinds together.
        masks: which tokens of a prompt are visual, bool ``[S]``, by its length.
    """

    subject: Subject
    ratio: float
    text: Codes | None
    visual: Codes | None
    masks: Mapping[int, Tensor]

    def prefill(self, prompts: Prompts) -> Any:
        """Coded keys and values of each layer, the length of the prompts, and the bytes of the
        bases that a sequence has of its own.
        """
        layers = prompts.layers
        if self.text is None or self.visual is None:
            own = [self._own(_row(layers, i)) for i in range(len(prompts.ids))]
            rows = [self._coded(_row(layers, i), some, some, prompts.length)
                    for i, some in enumerate(own)]  # fmt: skip
            kv = [
                tuple(torch.cat(sides) for sides in zip(*layer, strict=True))
                for layer in zip(*rows, strict=True)
            ]
            return kv, prompts.length, sum(map(basis_bytes, own)) / len(own)
        return self._coded(layers, self.text, self.visual, prompts.length), prompts.length, 0

    def _own(self, layers: Sequence[Layer]) -> Codes:
        return codes(sums(layers), self.subject.dim, self.ratio)

    def _coded(
        self, layers: Sequence[Layer], text: Codes, visual: Codes, length: int
    ) -> list[tuple[Tensor, Tensor]]:
        mask = between_exact(self.masks[length].to(self.subject.device), 0)[:, None]  # [T, 1]

        def through(of_text: Code, of_image: Code) -> Callable[[Tensor], Tensor]:
            def code(x: Tensor) -> Tensor:
                if of_text is of_image:
                    return _read_back(of_text, x)
                return torch.where(mask, _read_back(of_image, x), _read_back(of_text, x))

            return code

        return [
            (between(y.k, through(t[0], v[0])), between(y.v, through(t[1], v[1])))
            for y, t, v in zip(layers, text, visual, strict=True)
        ]

    def follow(self, cache: Any, ids: Tensor) -> Tensor:
        """All tokens at once: they see the coded context, and each other exactly."""
        kv, length, _ = cache
        return self.subject.follow(kv, length, ids)

    def sizes(self, cache: Any) -> Sizes:
        """Codes by the ratio that was asked for; with bases of sequences, without shared ones."""
        _, length, own = cache
        width = 2 * 2 * self.subject.layers * self.subject.heads * self.subject.dim
        coded, exact = length - SINKS - RECENT, SINKS + RECENT
        packed = width / self.ratio * coded + own
        whole_ratio = width * length / (packed + width * exact)
        return Sizes(width * coded / packed, whole_ratio, packed / coded, 0)

    def notes(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def _read_back(code: Code, x: Tensor) -> Tensor:
    params = code.on(x.device)
    return code.layout.decode(code.layout.encode(x, params), params, x.dtype)


def _row(layers: Sequence[Layer], row: int) -> list[Layer]:
    some = slice(row, row + 1)
    return [
        Layer(y.k[some], y.v[some], y.cos, y.sin, y.queries[some], y.received[some]) for y in layers
    ]
