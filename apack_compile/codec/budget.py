"""One byte budget over all layers, keys and values: bits where they lower the KL most.

With weights from a :class:`Sensitivity` the variances of all spectra have one unit, so that one
price of a byte settles everything: at price mu a run of components with variance e takes the bits
b that minimise e D_b + mu bytes(b) (reverse water-filling; D_b: distortion of a b-bit quantiser).
Kernels and compile time want few layouts: of the pairs that single layers would choose, those few
are kept that serve all layers best, found greedily.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bits import CLASSES
from .evicting import evicting
from .layout import PARTS
from .spectrum import RUN, Spectrum
from .tiered import felt_error, layout_of, mean_bits
from .transform import GAIN_DTYPE, TransformLayout

MOST_LAYOUTS = 6
"""Pairs of layouts (K and V) for layers of one shape."""

Counts = tuple[int, int, int]
"""Runs with 8, 4 and 2 bits."""


@dataclass(frozen=True)
class _Table:
    """Energies of one side of all layers.

    Attributes:
        energy: ``[L, runs]`` float64, descending.
        groups: of heads.
        fixed: bytes of the gains and the level of a token, in the mean.
        bits: of a component of each class, in the mean over the tokens.
        left: what its quantiser leaves of unit variance.
    """

    energy: Tensor
    groups: int
    fixed: float
    bits: tuple[float, ...]
    left: tuple[float, ...]

    @classmethod
    def of(
        cls, spectra: Sequence[Spectrum], gain: bool, shares: Sequence[int] = (), evicted: int = 0
    ) -> _Table:
        variances = torch.stack([s.variances.sum(0).double().cpu() for s in spectra])  # [L, n]
        runs = variances.shape[1] // RUN
        groups = spectra[0].mean.shape[0]
        energy = variances[:, : runs * RUN].unflatten(1, (runs, RUN)).sum(2)
        stay = 1 - evicted / PARTS
        fixed = stay * (groups * GAIN_DTYPE.itemsize if gain else 0) + bool(shares or evicted)
        bits = tuple(stay * mean_bits(b, shares) for b in CLASSES)
        return cls(energy, groups, fixed, bits, tuple(felt_error(b, shares) for b in CLASSES))

    def nbytes(self, counts: Counts) -> float:
        """Bytes of a token."""
        bits = sum(b * n for b, n in zip(self.bits, counts, strict=True))
        return self.groups * RUN * bits / 8 + self.fixed

    def wanted(self, price: float) -> list[Counts]:
        """What each layer takes when a byte costs ``price``."""
        bits = torch.tensor([*self.bits, 0], dtype=torch.float64)
        left = torch.tensor([*self.left, 1.0], dtype=torch.float64)
        cost = self.energy[..., None] * left + price * self.groups * RUN / 8 * bits  # [L, runs, 4]
        chosen = cost.argmin(-1)
        counts = torch.stack([(chosen == i).sum(1) for i in range(3)], 1).tolist()  # [L, 3]
        return [(a, b, c) if a + b + c else (0, 0, 1) for a, b, c in counts]

    def distortion(self, options: Sequence[Counts]) -> Tensor:
        """Distortion of every layer with each option: ``[L, options]``."""
        total = self.energy.sum(1, keepdim=True)
        so_far = torch.cat([torch.zeros_like(total), self.energy.cumsum(1)], 1)  # [L, runs + 1]
        ends = torch.tensor(options).cumsum(1)  # [options, 3]
        kept = torch.zeros(len(self.energy), len(options), dtype=torch.float64)
        start = torch.zeros(len(options), dtype=torch.int64)
        for i, left in enumerate(self.left):
            kept += (1.0 - left) * (so_far[:, ends[:, i]] - so_far[:, start])
            start = ends[:, i]
        return total - kept


def share_budget(
    keys: Sequence[Spectrum],
    values: Sequence[Spectrum],
    budget: int,
    most: int = MOST_LAYOUTS,
    shares: Sequence[int] = (),
    evicted: int = 0,
) -> list[tuple[TransformLayout, TransformLayout]]:
    """Layouts of keys and values of layers of one shape, under one budget.

    Args:
        keys, values: of each layer, variances in one unit.
        budget: bytes of a token in all layers together, gains counted.
        most: different pairs of layouts.
        shares: of the planes of values (``tiered.py``); none: all tokens have all bits.
        evicted: of ``PARTS`` tokens, how many are dropped: others take their bytes.

    Returns:
        A pair for each layer. Values carry a gain, keys do not.

    Raises:
        ValueError: no code is that small.
    """
    sides = _Table.of(keys, False, (), evicted), _Table.of(values, True, shares, evicted)
    low, high = -40.0, 0.0
    scale = float(sum(side.energy.sum() for side in sides)) or 1.0
    best: tuple[float, list[tuple[Counts, Counts]]] | None = None
    for _ in range(40):
        middle = (low + high) / 2
        pairs, error = _choose(sides, scale * math.exp(middle), most)
        if sum(_pair_bytes(sides, pair) for pair in pairs) > budget:
            low = middle
        else:
            high = middle
            if best is None or error < best[0]:
                best = error, pairs
    if best is None:
        raise ValueError(
            f"{len(keys)} layers of {keys[0].heads} KV heads of {keys[0].dim} have no code of "
            f"{budget} bytes a token"
        )
    pairs = _spend_rest(sides, best[1], budget)

    def layout(side: Spectrum, runs: Counts, *more: Any) -> TransformLayout:
        return evicting(layout_of(side.shape, [RUN * n for n in runs], *more), evicted)

    return [(layout(keys[0], k, False), layout(values[0], v, True, shares)) for k, v in pairs]


def _spend_rest(
    sides: tuple[_Table, _Table], pairs: list[tuple[Counts, Counts]], budget: int
) -> list[tuple[Counts, Counts]]:
    """Larger pairs for single layers, best value first: at one price some bytes are left over."""
    menu = sorted(set(pairs))
    errors = _errors(sides, menu)  # [L, menu]
    size = torch.tensor([_pair_bytes(sides, pair) for pair in menu], dtype=torch.float64)
    chosen = torch.tensor([menu.index(pair) for pair in pairs])
    while True:
        gain = errors.gather(1, chosen[:, None]) - errors
        more = size - size[chosen][:, None]
        fits = (gain > 0) & (size[chosen].sum() + more <= budget)
        if not fits.any():
            return [menu[i] for i in chosen.tolist()]
        value = torch.where(fits, gain / more.clamp_min(1e-9), -math.inf)
        layer, option = divmod(int(value.argmax()), len(menu))
        chosen[layer] = option


def _errors(sides: tuple[_Table, _Table], options: Sequence[tuple[Counts, Counts]]) -> Tensor:
    """Distortion of every layer with each pair: ``[L, options]``."""
    keys, values = sides
    return keys.distortion([k for k, _ in options]) + values.distortion([v for _, v in options])


def _choose(
    sides: tuple[_Table, _Table], price: float, most: int
) -> tuple[list[tuple[Counts, Counts]], float]:
    """The best few pairs at a price, one for each layer, and the distortion of all layers."""
    keys, values = sides
    options = sorted(set(zip(keys.wanted(price), values.wanted(price), strict=True)))
    errors = _errors(sides, options)
    paid = price * torch.tensor([float(_pair_bytes(sides, pair)) for pair in options])
    cost = errors + paid  # [L, options]
    kept: list[int] = []
    least = torch.full((len(cost),), math.inf, dtype=torch.float64)
    while len(kept) < min(most, len(options)):
        with_each = torch.minimum(least[:, None], cost).sum(0)
        kept.append(int(with_each.argmin()))
        least = torch.minimum(least, cost[:, kept[-1]])
    chosen = [kept[i] for i in cost[:, kept].argmin(1).tolist()]
    error = float(errors.gather(1, torch.tensor(chosen)[:, None]).sum())
    return [options[i] for i in chosen], error


def _pair_bytes(sides: tuple[_Table, _Table], pair: tuple[Counts, Counts]) -> float:
    return sides[0].nbytes(pair[0]) + sides[1].nbytes(pair[1])
