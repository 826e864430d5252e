from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apack_compile.codec.moments import Moments
from apack_compile.codec.rotation import POSITIONS, Rotation, Turn, partner

DIM, WIDTH, HEADS = 16, 12, 2


def tables(positions: Tensor, interleaved: bool, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[1, S, WIDTH]`` as models make them."""
    frequencies = 10.0 ** -torch.linspace(0, 3, WIDTH // 2, dtype=torch.float64)
    angles = positions.double()[:, None] * frequencies
    wide = angles.repeat_interleave(2, 1) if interleaved else torch.cat((angles, angles), 1)
    return wide.cos()[None] * scale, wide.sin()[None] * scale


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    first, rest = x[..., :WIDTH], x[..., WIDTH:]
    return torch.cat((first * cos + partner(first, interleaved) * sin, rest), -1)


def test_partner_is_what_models_call_rotate_half() -> None:
    x = torch.arange(6.0)
    assert partner(x, False).tolist() == [-3, -4, -5, 0, 1, 2]
    assert partner(x, True).tolist() == [-1, 0, -3, 2, -5, 4]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_undo_takes_the_rotation_out_and_leaves_the_length(interleaved: bool, scale: float) -> None:
    x = torch.randn(2, HEADS, 40, DIM)
    cos, sin = (t.float() for t in tables(torch.arange(40), interleaved, scale))
    turn = Turn.of(cos[:, None], sin[:, None], interleaved, 40)
    assert turn is not None
    expected = x.clone()
    expected[..., :WIDTH] *= scale
    torch.testing.assert_close(turn.undo(turned(x, cos, sin, interleaved)), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_moments_are_averaged_over_all_positions(interleaved: bool) -> None:
    reach = 500
    base = tables(torch.arange(60), interleaved)
    turn = Turn.of(*base, interleaved, 60)
    assert turn is not None
    rotation = turn.rotation(DIM)
    positions = (torch.arange(POSITIONS) + 0.5) / POSITIONS * reach
    cos, sin = tables(positions, interleaved)
    x = torch.randn(1, HEADS, 1, DIM, dtype=torch.float64)
    everywhere = turned(x.expand(-1, -1, POSITIONS, -1), cos, sin, interleaved)
    flat = everywhere[0].transpose(0, 1).flatten(1)  # [P, H * D]
    one = x.flatten()
    torch.testing.assert_close(rotation.mean(one, reach), flat.mean(0))
    torch.testing.assert_close(
        rotation.gram(torch.outer(one, one), reach), flat.mT @ flat / POSITIONS
    )


def test_angles_are_read_off_text_behind_an_image_whose_tokens_share_a_position() -> None:
    positions = torch.cat((torch.arange(5), torch.full((100,), 5), torch.arange(6, 46)))
    turn = Turn.of(*tables(positions, False), False, 145)
    assert turn is not None
    expected = 10.0 ** -torch.linspace(0, 3, WIDTH // 2, dtype=torch.float64)
    found = turn.rotation(DIM).frequencies
    torch.testing.assert_close(found[: WIDTH // 2], expected)
    assert not found[WIDTH:].any()


def test_tables_of_other_tokens_are_no_turn() -> None:
    cos, sin = tables(torch.arange(3), False)
    assert Turn.of(cos, sin, False, 40) is None  # a step on a dense past: 3 new tokens of 40
    assert Turn.of(None, None, False, 40) is None


def test_spread_moments_of_a_prompt_are_those_of_all_positions() -> None:
    """Bug: a basis fitted on 1,024 tokens gave a KL of 0.26 at 3,072 tokens of context."""
    x = torch.randn(1, HEADS, 300, DIM) + 2
    cos, sin = (t.float() for t in tables(torch.arange(300), False))
    turn = Turn.of(cos, sin, False, 300)
    assert turn is not None
    k = turned(x, cos, sin, False)
    rotation = turn.rotation(DIM)
    spread = Moments.of(k, k, k, None, turn).spread(rotation, 3000)
    far = torch.rand(100_000) * 3000
    cos, sin = (t.float() for t in tables(far, False))
    long = turned(x[:, :, torch.randint(300, far.shape)], cos, sin, False)
    whole = Moments.of(long, long, long, None)
    a, b = spread.k_gram / spread.count, whole.k_gram.double() / whole.count
    assert (a - b).norm() < 0.02 * b.norm()
    alone = Moments.of(k, k, k, None)
    assert (alone.k_gram / alone.count - b).norm() > 0.1 * b.norm()


def test_rotation_is_frozen_data() -> None:
    rotation = Rotation(torch.zeros(DIM, dtype=torch.float64), 0, False, torch.zeros(DIM))
    matrix = torch.randn(DIM, DIM, dtype=torch.float64)
    torch.testing.assert_close(rotation.gram(matrix, 100), matrix)
