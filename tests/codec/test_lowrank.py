from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apack_compile.codec import LowRankLayout, parse_layout
from apack_compile.codec.lowrank import FACTOR_DTYPE, factor
from apack_compile.codec.rotation import rotate

from ..helpers import few

HEADS, DIM = 2, 8


def low_rank_tokens(rank: int, tokens: int = 60, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(batch, tokens, rank, generator=generator)
    right = torch.randn(batch, rank, HEADS * DIM, generator=generator)
    return (left @ right).unflatten(2, (HEADS, DIM)).transpose(1, 2)  # [B, H, T, D]


@given(rank=st.integers(1, 16), extra=st.integers(0, 3))
@few
def test_tokens_of_low_rank_are_kept_up_to_16_bits(rank: int, extra: int) -> None:
    x = low_rank_tokens(rank)
    layout = LowRankLayout(HEADS, DIM, min(rank + extra, HEADS * DIM))
    code = factor(x, layout, None, None).code
    basis = code.params[0]
    assert (basis.shape, basis.dtype) == ((2, HEADS * DIM, layout.rank), FACTOR_DTYPE)
    back = layout.decode(layout.encode(x, code.params), code.params, torch.float32)
    assert (back - x).norm() < 3e-3 * x.norm()  # 11-bit factors


def test_the_error_is_that_of_the_truncated_svd() -> None:
    x = torch.randn(1, HEADS, 300, DIM) * torch.linspace(3, 0.1, DIM)
    flat = x.transpose(1, 2).flatten(2)[0].double()
    for rank in (2, 6, 12):
        layout = LowRankLayout(HEADS, DIM, rank)
        code = factor(x, layout, None, None).code
        back = layout.decode(layout.encode(x, code.params), code.params, torch.float32)
        best = torch.linalg.svdvals(flat)[rank:].square().sum()
        error = (back - x).double().square().sum()
        assert best <= error * 1.001 and error < 1.01 * best  # two power iterations


def test_scores_and_mix_are_those_of_the_decoded_tokens() -> None:
    x = torch.randn(2, HEADS, 30, DIM)
    positions = torch.arange(30)[None] + torch.tensor([[0], [4]])
    waves = torch.rand(2, 1).expand(2, 4)
    layout = LowRankLayout(HEADS, DIM, 5, rotary=4)
    code = factor(x, layout, waves, positions).code
    assert len(code.params) == layout.param_count == 2
    payload = layout.encode(x, code.params, positions)
    back = layout.decode(payload, code.params, torch.float64, positions).repeat_interleave(2, 1)
    q = torch.randn(2, 2 * HEADS, 3, DIM, dtype=torch.float64)
    torch.testing.assert_close(layout.scores(q, payload, code.params, positions), q @ back.mT)
    values = LowRankLayout(HEADS, DIM, 5)
    code = factor(x, values, None, None).code
    payload = values.encode(x, code.params)
    back = values.decode(payload, code.params, torch.float64).repeat_interleave(2, 1)
    p = torch.rand(2, 2 * HEADS, 3, 30, dtype=torch.float64)
    torch.testing.assert_close(values.mix(p, payload, code.params), p @ back)


def test_keys_of_low_rank_before_their_rotation_are_kept() -> None:
    plain = low_rank_tokens(3)
    positions, waves = torch.arange(60)[None], torch.tensor([[0.7], [0.2]]).expand(2, DIM)
    x = rotate(plain, positions, waves, False)
    for layout, small in (
        (LowRankLayout(HEADS, DIM, 3, DIM), True),
        (LowRankLayout(2, 8, 3), False),
    ):
        code = factor(x, layout, waves if layout.positional else None, positions).code
        back = layout.decode(
            layout.encode(x, code.params, positions), code.params, torch.float32, positions
        )
        assert bool((back - x).norm() < 3e-3 * x.norm()) is small


def test_padding_and_broken_tokens_do_not_count() -> None:
    x = low_rank_tokens(3, batch=1)
    broken = torch.cat([1e4 * torch.randn(1, HEADS, 5, DIM), x], 2)
    broken[:, :, 20, 1] = float("nan")
    counts = torch.arange(65)[None] >= 5
    layout = LowRankLayout(HEADS, DIM, 3)
    basis = factor(broken, layout, None, None, counts).code.params[0].float()
    inside = basis @ basis.mT
    flat = x.transpose(1, 2).flatten(2)
    assert (flat @ inside - flat).norm() < 3e-3 * flat.norm()


def test_fewer_tokens_than_the_rank() -> None:
    x = torch.randn(1, HEADS, 3, DIM)
    layout = LowRankLayout(HEADS, DIM, 10)
    code = factor(x, layout, None, None).code
    assert code.params[0].shape == (1, HEADS * DIM, 10)
    back = layout.decode(layout.encode(x, code.params), code.params, torch.float32)
    assert (back - x).norm() < 3e-3 * x.norm()


def test_the_users_random_numbers_stay_as_they_are() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    factor(
        torch.randn(1, HEADS, 20, DIM, generator=torch.Generator()),
        LowRankLayout(2, 8, 4),
        None,
        None,
    )
    assert torch.equal(torch.rand(3), expected)


def test_rows_are_selected_and_counted() -> None:
    x = low_rank_tokens(4)
    ref = factor(x, LowRankLayout(HEADS, DIM, 4), None, None)
    chosen = ref.select(torch.tensor([1, 1, 0]))
    assert torch.equal(chosen.code.params[0], ref.code.params[0][[1, 1, 0]])
    assert ref.cache_bytes == 2 * HEADS * DIM * 4 * 2


@pytest.mark.parametrize("rotary", [0, 4])
def test_specs_come_back(rotary: int) -> None:
    layout = LowRankLayout(3, 8, 7, rotary)
    assert parse_layout(layout.spec) == layout
    assert layout.per_sequence and layout.token_bytes(torch.bfloat16) == 14
