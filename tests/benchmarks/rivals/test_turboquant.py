from __future__ import annotations

import math

import pytest
import torch

from benchmarks.quality.rivals.base import Size
from benchmarks.quality.rivals.turboquant import (
    TurboQuant,
    gaussian_levels,
    hadamard,
    rotate_and_quantise,
    rotation,
)

from .cases import assert_exact_outside, layer


@pytest.mark.parametrize(
    ("bits", "levels", "error"),
    [  # Max (1960), table I
        (1, [0.7980], 0.3634),
        (2, [0.4528, 1.510], 0.1175),
        (3, [0.2451, 0.7560, 1.344, 2.152], 0.03454),
    ],
)
def test_levels_are_those_of_max(bits: int, levels: list[float], error: float) -> None:
    ours = gaussian_levels(bits)
    half = len(levels)
    assert ours[half:].tolist() == pytest.approx(levels, abs=6e-4)
    assert ours[:half].flip(0).tolist() == pytest.approx([-x for x in levels], abs=6e-4)
    # the error, by integration on a fine grid
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    nearest = (x[:, None] - ours).abs().amin(1)
    density = (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)
    assert float((nearest.square() * density).sum() * (x[1] - x[0])) == pytest.approx(
        error, abs=2e-4
    )


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_the_rotation_is_orthonormal(size: int) -> None:
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(hadamard(size) @ hadamard(size).T, eye)
    torch.testing.assert_close(rotation(size, 3) @ rotation(size, 3).T, eye)
    assert hadamard(size).abs().sub(size**-0.5).abs().max() < 1e-15


def test_a_size_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="size=12: accepted is a power of two"):
        hadamard(12)


def test_long_gaussian_vectors_lose_what_the_levels_lose() -> None:
    x = torch.randn(1000, 1024, dtype=torch.float64)
    error = (rotate_and_quantise(x, 2, 0) - x).square().mean() / x.square().mean()
    assert float(error) == pytest.approx(0.1175, abs=0.003)


def test_each_vector_has_its_own_scale() -> None:
    x = torch.randn(5, 16, dtype=torch.float64)
    scale = torch.tensor([1e-3, 1, 10, 100, 1e4], dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        rotate_and_quantise(scale * x, 3, 0), scale * rotate_and_quantise(x, 3, 0)
    )
    assert torch.equal(rotate_and_quantise(torch.zeros(2, 16), 2, 0), torch.zeros(2, 16))


def test_sinks_and_recent_tokens_are_exact() -> None:
    given = layer(200)
    k, v = TurboQuant(2).code(given)
    assert_exact_outside(k, given.k)
    assert_exact_outside(v, given.v)


def test_bytes() -> None:
    # 100 tokens of 3 heads of 64, keys and values: 2 bits a number, 2 bytes a vector
    assert TurboQuant(2).coded_bytes(Size(100, 3, 64)) == 100 * 2 * (192 / 4 + 3 * 2)
