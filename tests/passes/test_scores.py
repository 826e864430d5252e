from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .capture import CLOSE, capture, repeat_kv, rewrite, run
from .written_out import LOWEST, decode, given, plain

# Weights under several masks: a bias of each head [4, 1, S] beside m.
SEVERAL: dict[str, tuple[Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], list[float]]] = {
    "two added": (lambda q, k, m, b: (plain(q, k) + b + m).softmax(-1), [1, 1]),
    "as MPT": (
        lambda q, k, m, b: (plain(q, k) * 0.5 + b).masked_fill(m < 0, LOWEST).softmax(-1), [1, 1]),
    "as Falcon": (
        lambda q, k, m, b: ((plain(q, k).view(2, 4, 3, 33) + b).mul_(0.5) + m).softmax(-1),
        [0.5, 1]),
    "turned round": (lambda q, k, m, b: ((plain(q, k) + b) * -0.5 + m).softmax(-1), [-0.5, 1]),
    "taken off": (
        lambda q, k, m, b: (plain(q, k) - b - 1e9 * (1.0 - (m == 0).float())).softmax(-1),
        [-1, -1]),
    "taken off in place": (
        lambda q, k, m, b: (plain(q, k).sub_(b) * 0.5).sub_((m < 0) * 1e9).softmax(-1),
        [-0.5, -1]),
    # Bug: masks of whole numbers were said to be of none.
    "whole numbers": (
        lambda q, k, m, b: (
            plain(q, k) - 10000 * (m < 0).long() + b.round().long()).softmax(-1), [-1, 1]),
    "two that hide": (
        lambda q, k, m, b: torch.where(
            b < 3, plain(q, k), -1e9).masked_fill(m < 0, LOWEST).softmax(-1), [1, 1]),
    "capped": (
        lambda q, k, m, b: (((plain(q, k) / 2).tanh() * 2 + b) * 0.5 + m).softmax(-1), [0.5, 1]),
}  # fmt: skip


def test_a_mask_with_the_sizes_of_the_scores_is_not_made_of_them() -> None:
    """Their product stays for its sizes; whatever compiles the graph drops it."""

    def weigh(q: Tensor, k: Tensor, m: Tensor) -> Tensor:
        s = plain(q, k)
        return (s + torch.zeros_like(s).masked_fill(m < 0, LOWEST)).softmax(-1)

    captured = capture(decode(weigh), *given(3))
    assert (captured.treatments, captured.reasons) == (["attend"], [])
    (got, *_), _ = run(captured, rewrite(captured))
    torch.testing.assert_close(got, captured.expected()[0], **CLOSE)


def bias(keys: int) -> Tensor:
    return torch.tensor([0.1, 0.2, 0.0, -0.3])[:, None, None] * torch.arange(keys)


@pytest.mark.parametrize("form", SEVERAL)
def test_several_masks_are_laid_over_the_scores(form: str) -> None:
    weigh, factors = SEVERAL[form]

    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, m: Tensor, b: Tensor) -> Any:
        keys, values = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return weigh(q, repeat_kv(keys), m, b) @ repeat_kv(values), keys, values

    captured = capture(fn, *given(3), bias(33))
    assert (captured.treatments, captured.reasons) == (["attend"], [])
    assert captured.plan.sites[0].cached.site.mask is not None
    assert [part.factor for part in captured.plan.sites[0].cached.site.mask.parts] == factors
    new = rewrite(captured)
    (got, *_), _ = run(captured, new)
    torch.testing.assert_close(got, captured.expected()[0], **CLOSE)
    assert not {"softmax", "matmul", "unpack", "masked_fill", "tanh"} & set(new.calls)


@pytest.mark.parametrize("form", ["a bias", "a factor"])
@pytest.mark.parametrize("in_front", [True, False])
def test_of_two_products_that_of_stored_keys_is_the_scores(form: str, in_front: bool) -> None:
    """Bug: it was the first one, with a reason that spoke of a table of positions."""

    def weigh(q: Tensor, k: Tensor, m: Tensor) -> Tensor:
        table = torch.arange(k.shape[2] * 8.0).view(1, 1, -1, 8).cos().expand(2, 4, -1, -1)
        scores, other = plain(q, k), plain(q, table if form == "a bias" else table[:, :, :1])
        first, second = (other, scores) if in_front else (scores, other)
        return ((first + second if form == "a bias" else first * second) + m).softmax(-1)

    captured = capture(decode(weigh), *given(3))
    assert (captured.treatments, captured.reasons) == (["attend"], [])
    (got, *_), _ = run(captured, rewrite(captured))
    torch.testing.assert_close(got, captured.expected()[0], **CLOSE)


def test_one_mask_of_whole_numbers_is_added_as_it_is() -> None:
    """Bug: a mask of whole numbers was said to be none of numbers."""

    def weigh(q: Tensor, k: Tensor, m: Tensor) -> Tensor:
        return (plain(q, k) + (m < 0).long() * -10000).softmax(-1)

    captured = capture(decode(weigh), *given(3))
    assert (captured.treatments, captured.reasons) == (["attend"], [])
    (got, *_), _ = run(captured, rewrite(captured))
    torch.testing.assert_close(got, captured.expected()[0], **CLOSE)
