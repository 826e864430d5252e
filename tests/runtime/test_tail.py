"""Operators on the last tokens alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apack_compile.runtime.tail import ATTENTION, Tail

pytestmark = pytest.mark.usefixtures("gradients_on")

LENGTH, TAIL = 12, 5
PAST = LENGTH - TAIL


@pytest.fixture
def gradients_on() -> Iterator[None]:
    with torch.enable_grad():
        yield


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def gradients(out: Tensor, of: list[Tensor], dim: int) -> tuple[Tensor, ...]:
    work = out.narrow(dim, PAST, TAIL)
    weights = torch.arange(work.numel()).view_as(work).sin()
    return torch.autograd.grad((work * weights).sum(), of)


def check(target: Any, given: list[Tensor], dim: int, *args: Any, **kwargs: Any) -> None:
    """Results of all tokens, and the gradients of the last ones' work."""
    want = target(*given, *args, **kwargs)
    got = Tail(LENGTH, TAIL, known=False).call(target, (*given, *args), kwargs)
    torch.testing.assert_close(got, want)
    pairs = zip(gradients(got, given, dim), gradients(want, given, dim), strict=True)
    for mine, right in pairs:
        torch.testing.assert_close(mine, right)
    known = Tail(LENGTH, TAIL, known=True).call(target, (*given, *args), kwargs)
    torch.testing.assert_close(known.narrow(dim, PAST, TAIL), want.narrow(dim, PAST, TAIL))
    assert not known.narrow(dim, 0, PAST).any()


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    check(F.linear, leaves((2, LENGTH, 8), (6, 8), *([(6,)] * bias)), 1)
    check(torch._C._nn.linear, leaves((2, LENGTH, 8), (6, 8)), 1)


MASKS: dict[str, Any] = {
    "none": None,
    "bool": torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None],
    "float": torch.randn(2, 4, LENGTH, LENGTH),
    "the same for all queries": torch.arange(LENGTH)[None, None, None] != 3,
}


@pytest.mark.parametrize("mask", MASKS)
def test_attention(mask: str) -> None:
    given = leaves(*[(2, 4, LENGTH, 8)] * 3)
    check(ATTENTION, given, 2, attn_mask=MASKS[mask], scale=0.3)


@pytest.mark.parametrize("keys", [LENGTH, LENGTH + 3, LENGTH - 1])
def test_causal_attention_of_grouped_heads(keys: int) -> None:
    given = leaves((2, 4, LENGTH, 8), (2, 2, keys, 8), (2, 2, keys, 8))
    check(ATTENTION, given, 2, is_causal=True, enable_gqa=True)


def test_gradients_of_tokens_before_the_last_ones_are_not_kept() -> None:
    x, weight = leaves((1, LENGTH, 8), (6, 8))
    out = Tail(LENGTH, TAIL, known=False).call(F.linear, (x, weight), {})
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert not grad[:, :PAST].any() and grad[:, PAST:].all()


@pytest.mark.parametrize(
    "shape", [(LENGTH, 8), (2, LENGTH + 1, 8), (2, 3, LENGTH, 8)], ids=lambda shape: str(len(shape))
)
def test_other_shapes_run_as_they_are(shape: tuple[int, ...]) -> None:
    x, weight = leaves(shape, (6, 8))
    out = Tail(LENGTH, TAIL, known=True).call(F.linear, (x, weight), {})
    torch.testing.assert_close(out, F.linear(x, weight))


def test_other_operators_run_as_they_are() -> None:
    (x,) = leaves((2, LENGTH, 8))
    assert torch.equal(Tail(LENGTH, TAIL, known=True).call(torch.exp, (x,), {}), x.exp())
    assert Tail(LENGTH, TAIL, known=True).call(max, (3, 4), {}) == 4
