"""Windows of the last tokens, stored instead of the whole cache or beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apack_compile.passes.find_updates import CUT_TOO

from .capture import capture, packed, tokens
from .test_find_updates import kinds, reasons, sdpa


@pytest.mark.parametrize("make", [tokens, packed])
def test_a_sliding_window_is_left_alone(make: Callable[[int], Tensor]) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
        keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return sdpa(q, keys, values), keys[:, :, -20:], values[:, :, -20:]

    captured = capture(fn, tokens(1), tokens(1), tokens(1), make(40), make(40))
    assert kinds(captured) == []
    assert reasons(captured) == ["the whole cache is not stored (sliding window): left dense"]


TAILS: dict[str, Callable[[Tensor], Tensor]] = {
    "as transformers": lambda x: x[:, :, -20:, :],
    "short": lambda x: x[:, :, -20:],
    "ellipsis": lambda x: x[..., -20:, :],
    "ellipsis behind": lambda x: x[:, :, -20:, ...],
    "counted from the front": lambda x: x[:, :, max(x.shape[2] - 20, 0) :],
    "copied": lambda x: x[:, :, -20:].contiguous(),
}


def beside_a_part(part: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Stores the whole, and a part of it."""

    def fn(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
        keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return sdpa(q, keys, values), keys, values, part(keys), part(values)

    return fn


@pytest.mark.parametrize("part", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("make", [tokens, lambda count: torch.tensor([])], ids=["dense", "empty"])
def test_a_sliding_window_whose_whole_is_stored_beside_it_is_left_alone(
    part: Callable[[Tensor], Tensor], make: Callable[[int], Tensor]
) -> None:
    """Bug: Gemma 3n of transformers 4 hands the whole to other layers in an attribute of its cache;
    that was packed, and fitted anew at every step, which grew from the window."""
    captured = capture(beside_a_part(part), *[tokens(3)] * 3, make(40), make(40))
    assert kinds(captured) == []
    assert reasons(captured) == [CUT_TOO]


def test_a_prefill_without_a_cat_whose_last_tokens_are_stored_too_is_left_alone() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Any:
        keys, values = k * 2, v * 2
        return sdpa(q, keys, values), keys, values, keys[:, :, -4:], values[:, :, -4:]

    captured = capture(fn, *[tokens(6)] * 3)
    assert kinds(captured) == []
    assert reasons(captured) == [CUT_TOO]


@pytest.mark.parametrize("part", [
    lambda x: x[:, :, :20],
    lambda x: x[:, :, -1],
    lambda x: x[..., -4:],
    lambda x: x[:, -1:],
    lambda x: x[:, None, -1:],
    lambda x: x[:, :, -20:] * 2,
    lambda x: x[0, :, -20:],
    lambda x: x[()] * 2,
], ids=["first tokens", "one token", "channels", "heads", "heads, one more dimension", "computed",
        "a row", "all"])  # fmt: skip
def test_a_cache_of_which_another_part_is_stored_too_is_found(
    part: Callable[[Tensor], Tensor],
) -> None:
    captured = capture(beside_a_part(part), *[tokens(3)] * 3, tokens(40), tokens(40))
    assert kinds(captured) == [("dense", "dense")]
    assert reasons(captured) == []


def test_a_packed_cache_whose_last_tokens_are_stored_too_is_found() -> None:
    """It was stored whole: the tokens are something else."""
    fn = beside_a_part(TAILS["as transformers"])
    captured = capture(fn, *[tokens(3)] * 3, packed(40), packed(40))
    assert reasons(captured) == [] and kinds(captured) == [("packed", "packed")]


def test_packed_keys_that_are_read_as_they_are_may_be_stored_in_part() -> None:
    fn = lambda q, k, v: (sdpa(q, k, v), k[:, :, -20:], v[:, :, -20:])  # noqa: E731
    captured = capture(fn, tokens(1), packed(40), packed(40))
    assert reasons(captured) == [] and kinds(captured) == [("fixed", "fixed")]
