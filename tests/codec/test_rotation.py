from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apack_compile.codec.moments import Moments
from apack_compile.codec.rotation import Rotation, Turn, partner, rotate

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
    cos, sin = tables(torch.arange(reach), interleaved)
    x = torch.randn(1, HEADS, 1, DIM, dtype=torch.float64)
    everywhere = turned(x.expand(-1, -1, reach, -1), cos, sin, interleaved)
    flat = everywhere[0].transpose(0, 1).flatten(1)  # [P, H * D]
    one = x.flatten()
    torch.testing.assert_close(rotation.mean(one, reach), flat.mean(0))
    torch.testing.assert_close(rotation.gram(torch.outer(one, one), reach), flat.mT @ flat / reach)


def test_angles_are_read_off_text_behind_an_image_whose_tokens_share_a_position() -> None:
    positions = torch.cat((torch.arange(5), torch.full((100,), 5), torch.arange(6, 46)))
    turn = Turn.of(*tables(positions, False), False, 145)
    assert turn is not None
    expected = 10.0 ** -torch.linspace(0, 3, WIDTH // 2, dtype=torch.float64)
    found = turn.rotation(DIM).frequencies
    torch.testing.assert_close(found[: WIDTH // 2], expected)
    assert not found[WIDTH:].any()


def test_angles_are_exact_far_from_the_start() -> None:
    """Bug: steps between neighbours alone are off by 1e-5: 0.3 radians at position 30,000."""
    cos, sin = (t.bfloat16() for t in tables(torch.arange(3000), False))
    turn = Turn.of(cos, sin, False, 3000)
    assert turn is not None
    expected = 10.0 ** -torch.linspace(0, 3, WIDTH // 2, dtype=torch.float64)
    found = turn.rotation(DIM).frequencies[: WIDTH // 2]
    assert (found - expected).abs().max() * 30_000 < 0.1


def test_positions_count_from_the_first_visible_token_of_each_sequence() -> None:
    visible = torch.arange(40) >= torch.tensor([[0], [7]])
    rows = [tables((torch.arange(40) - pad).clamp(min=0) + 3, False) for pad in (0, 7)]
    cos, sin = (torch.cat(t) for t in zip(*rows, strict=True))
    turn = Turn.of(cos, sin, False, 40)
    assert turn is not None
    rotation = turn.rotation(DIM, visible)
    assert rotation.strays == 0
    expected = 10.0 ** -torch.linspace(0, 3, WIDTH // 2, dtype=torch.float64)
    torch.testing.assert_close(rotation.phases[: WIDTH // 2], 3 * expected)
    assert not rotation.phases[WIDTH:].any()
    assert turn.rotation(DIM).strays > 0.4  # without the mask, the second row is off by 7


def test_tokens_of_an_image_stray() -> None:
    positions = torch.cat((torch.arange(5), torch.full((100,), 5), torch.arange(6, 46)))
    turn = Turn.of(*tables(positions, False), False, 145)
    assert turn is not None
    assert turn.rotation(DIM).strays > 0.5


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotating_and_back(interleaved: bool) -> None:
    x = torch.randn(2, HEADS, 9, DIM, dtype=torch.float64)
    positions = torch.randint(0, 5000, (2, 9))
    waves = torch.rand(2, WIDTH, dtype=torch.float64)
    half = torch.arange(WIDTH) // 2 if interleaved else torch.arange(WIDTH) % (WIDTH // 2)
    waves = waves[:, half]  # the two of a pair turn alike
    there = rotate(x, positions, waves, interleaved)
    torch.testing.assert_close(rotate(there, positions, -waves, interleaved), x)
    torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1))
    angles = positions[:, None, :, None] * waves[0] + waves[1]
    expected = turned(x, angles.cos(), angles.sin(), interleaved)
    torch.testing.assert_close(there, expected)


def test_padding_images_and_few_words_do_not_hide_the_angles() -> None:
    """Bugs: rows of padding, an image at the end, or under 32 words gave angles of 0."""
    pad, words, image = [0] * 80, list(range(1, 11)), [11] * 60
    expected = 10.0 ** -torch.linspace(0, 3, WIDTH // 2, dtype=torch.float64)
    for rows in ([pad + words], [words + image], [pad + words, list(range(90))]):
        count = len(rows[0])
        cos, sin = (
            torch.cat(t) for t in zip(*(tables(torch.tensor(r), False) for r in rows), strict=True)
        )
        turn = Turn.of(cos, sin, False, count)
        assert turn is not None
        visible = torch.tensor([[position > 0 or len(rows) > 1 for position in r] for r in rows])
        rotation = turn.rotation(DIM, visible)
        assert rotation is not None
        torch.testing.assert_close(rotation.frequencies[: WIDTH // 2], expected)


@pytest.mark.parametrize("positions", [[3], [0, 0, 0], []])
def test_too_few_tokens_show_no_angle(positions: list[int]) -> None:
    """Bug: a first prompt of one token ended in an IndexError."""
    count = len(positions)
    turn = Turn.of(*tables(torch.tensor(positions, dtype=torch.int64), False), False, count)
    assert turn is not None and turn.rotation(DIM) is None


def test_a_reach_that_is_a_multiple_of_a_wave_is_no_resonance() -> None:
    """Bug: 1,024 positions spread over 6,434 tokens gave a mean cosine of -1 for 1 radian."""
    rotation = Rotation(torch.ones(2, dtype=torch.float64), 2, False, torch.zeros(2))
    mean = rotation.mean(torch.tensor([1.0, 0.0], dtype=torch.float64), 6434)
    assert mean.norm() < 1e-3


def test_tables_by_head_are_no_turn() -> None:
    cos, sin = tables(torch.arange(40), False)
    assert Turn.of(cos.expand(3, -1, -1)[None], sin.expand(3, -1, -1)[None], False, 40) is None
    flat = Turn.of(cos[0], sin[0], False, 40)
    assert flat is not None and flat.cos.shape == (1, 40, WIDTH)


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
