from __future__ import annotations

import pytest
import torch

from apack_compile import ops  # noqa: F401  (registers the operators)

LEAST = {d: torch.finfo(d).min for d in (torch.float16, torch.bfloat16, torch.float32)}


@pytest.mark.parametrize(("live", "new"), [(0, 1), (3, 1), (2, 4), (7, 1), (0, 8)])
def test_append_writes_behind_the_live_slots_and_nowhere_else(live: int, new: int) -> None:
    ring = torch.full((2, 3, 8, 4), -1.0)
    tokens = torch.randn(2, 3, new, 4)
    expected = ring.clone()
    expected[:, :, live : live + new] = tokens
    assert torch.ops.apack.append_(ring, tokens, torch.tensor([5, live + new])) is None
    assert torch.equal(ring, expected)


def test_append_casts_to_the_dtype_of_the_ring() -> None:
    ring = torch.zeros(1, 1, 4, 2, dtype=torch.bfloat16)
    torch.ops.apack.append_(ring, torch.full((1, 1, 1, 2), 1 / 3), torch.tensor([0, 1]))
    assert torch.equal(ring[0, 0, 0], torch.full((2,), 1 / 3).bfloat16())


def test_append_without_room_is_refused() -> None:
    with pytest.raises((RuntimeError, IndexError), match=r"out of (range|bounds)"):
        torch.ops.apack.append_(
            torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 1, 2), torch.tensor([0, 5])
        )


def seen(mask: torch.Tensor, batch: int, length: int) -> list[list[int]]:
    return torch.ops.apack.visible(mask, batch, length).int().tolist()


def test_a_token_is_visible_if_any_query_of_any_head_sees_it() -> None:
    mask = torch.zeros(2, 2, 3, 4, dtype=torch.bool)
    mask[0, 0, 1, 2] = mask[0, 1, 0, 3] = mask[1, 0, 0, 0] = True
    assert seen(mask, 2, 4) == [[0, 0, 1, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("dtype", "hidden"),
    [(d, least) for d, least in LEAST.items()] + [(torch.float32, float("-inf"))],
)
def test_float_masks_hide_by_very_low_numbers(dtype: torch.dtype, hidden: float) -> None:
    mask = torch.zeros(1, 1, 2, 4, dtype=dtype)
    mask[..., :2] = hidden
    mask[..., 2] = -50  # a bias, not a mask
    assert seen(mask, 1, 4) == [[0, 0, 1, 1]]


@pytest.mark.parametrize("shape", [(1, 1, 3, 4), (3, 4), (1, 3, 4), (1, 1, 3, 1), (1, 1)])
def test_masks_of_any_broadcastable_shape_are_read(shape: tuple[int, ...]) -> None:
    assert seen(torch.ones(shape, dtype=torch.bool), 2, 4) == [[1] * 4] * 2


def test_left_padding_of_a_causal_prefill_is_hidden() -> None:
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    mask = causal & real[:, None, None]
    assert seen(mask, 2, 5) == real.int().tolist()
