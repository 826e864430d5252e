from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apack_compile.codec import TransformLayout
from apack_compile.codec.half import HALF, halved, power_of_two

from ..helpers import few


@given(scale=st.integers(-30, 30), seed=st.integers(0, 99))
@few
def test_every_column_has_eleven_bits_whatever_its_scale(scale: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    matrix = matrix * 2.0 ** (scale * torch.tensor([-1.0, 0.0, 1.0, 2.0, 0.5]).double())
    half, units = halved(matrix, 1)
    assert half.dtype == HALF and units.dtype == torch.float32
    assert units.shape == (2, 5)
    assert half.abs().amax(1).eq(1).all()
    largest = matrix.abs().amax(1, keepdim=True)
    # 11 bits of what is as large as half the largest, and as fine a step for what is less
    assert ((half.double() * units[:, None] - matrix).abs() <= largest * 2.0**-12).all()


def test_a_column_of_zeros_stays_one() -> None:
    half, units = halved(torch.zeros(3, 2), 0)
    assert torch.equal(half, torch.zeros(3, 2, dtype=HALF))
    assert torch.equal(units, torch.ones(2))


@pytest.mark.parametrize(("size", "power"), [(1.0, 1), (1.5, 2), (2.0, 2), (0.3, 0.5), (0, 1)])
def test_powers_of_two(size: float, power: float) -> None:
    assert float(power_of_two(torch.tensor(size))) == power


@pytest.mark.parametrize("typical", [1e-4, 1.0, 1e6])
def test_tokens_of_any_scale_are_coded_as_well(typical: float) -> None:
    """Products are made in the range of float16, whatever the range of the tokens."""
    layout = TransformLayout(1, 16, 1, 16, 0, 0, 0)
    every, step = torch.eye(16)[None], torch.full((1, 16), typical / 32)
    params = layout.params_of(
        torch.zeros(1, 16), every / step[:, None], every * step[:, :, None], every, step,
        typical=typical,
    )  # fmt: skip
    x = typical * torch.randn(1, 1, 50, 16).clamp(-3, 3)
    assert 16 <= (x * params[-1][0]).abs().amax() <= 6 * 16, "what products are made of"
    back = layout.decode(layout.encode(x, params), params, x.dtype)
    assert ((back - x).abs() <= 0.5001 * typical / 32).all()


def test_a_number_far_out_of_range_counts_as_the_largest() -> None:
    layout = TransformLayout(1, 16, 1, 16, 0, 0, 1)
    one, every = torch.ones(1, 16), torch.eye(16)[None]
    params = layout.params_of(0 * one, every, every, every, one, one)
    x = torch.zeros(1, 1, 1, 16)
    x[..., 0] = 1e30
    payload, judged = layout.encode_and_judge(x, params)
    assert payload[1].item() == pytest.approx(4094 / 4, rel=1e-3)  # its root mean square
    assert judged is not None and judged.size.item() == pytest.approx(4094.0**2, rel=1e-3)
