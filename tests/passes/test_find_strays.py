from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apack_compile.passes.find_strays import REASON

from .capture import Captured, capture, packed, tokens

sdpa = F.scaled_dot_product_attention
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def unknown(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by sums of products of single numbers."""
    weights = (q[:, :, :, None] * k[:, :, None]).sum(-1).softmax(-1)
    return (weights[..., None] * v[:, :, None]).sum(-2)


def decode(attend: Attend, dim: int = 2) -> Callable[..., Any]:
    """Two layers, with a projection between them."""

    def fn(x: Tensor, weight: Tensor, *past: Tensor) -> Any:
        stored: list[Tensor] = []
        for layer in (0, 1):
            keys = torch.cat([past[2 * layer], F.linear(x, weight)], dim)
            values = torch.cat([past[2 * layer + 1], F.linear(x, weight) * 2], dim)
            x = x + F.linear(attend(x, keys, values), weight)
            stored += [keys, values]
        return x, *stored

    return fn


def strays(captured: Captured) -> list[str]:
    """Names of the caches that are reported."""
    return [skip.where for skip in captured.plan.skipped if skip.reason == REASON]


def layers(attend: Attend, past: Callable[[int], Tensor] = tokens, dim: int = 2) -> Captured:
    return capture(decode(attend, dim), tokens(1), torch.randn(8, 8), *[past(9) for _ in range(4)])


def test_each_layer_whose_attention_is_unknown_is_named_once() -> None:
    assert strays(layers(unknown)) == ["keys", "keys_1"]


def test_attention_that_is_found_or_left_alone_with_a_reason_is_no_stray() -> None:
    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.tanh(q @ k.mT).softmax(-1) @ v

    for attend in (sdpa, capped):
        captured = layers(attend)
        assert strays(captured) == []
        assert bool(captured.plan.sites) != bool(captured.reasons)


def test_tokens_may_stand_before_heads() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bqhd,bshd->bhqs", q, k).softmax(-1)
        return torch.einsum("bhqs,bshd->bqhd", weights, v)

    def make(count: int) -> Tensor:
        return tokens(count).transpose(1, 2).contiguous()

    args = (make(1), torch.randn(8, 8), *[make(9) for _ in range(4)])
    assert strays(capture(decode(attend, 1), *args)) == ["keys", "keys_1"]


def test_a_first_prefill_and_a_sliding_window_are_caches_too() -> None:
    def prefill(q: Tensor, k: Tensor) -> Any:
        keys = torch.cat([torch.tensor([]), k], -2)
        return unknown(q, keys, keys), keys

    def sliding(q: Tensor, k: Tensor, past: Tensor) -> Any:
        keys = torch.cat([past, k], -2)
        return unknown(q, keys, keys), keys[:, :, -8:, :]

    assert strays(capture(prefill, tokens(9), tokens(9))) == ["keys"]
    assert strays(capture(sliding, tokens(1), tokens(1), tokens(9))) == ["keys"]


def test_what_is_no_cache_is_not_named() -> None:
    def fn(x: Tensor, past: Tensor, mask: Tensor) -> Any:
        halves = torch.cat([past, x], -1)
        unstored = torch.cat([past, x], 2)
        return halves, unstored * 2, torch.cat([mask, mask], -1)

    assert strays(capture(fn, tokens(9), tokens(9), torch.ones(2, 9))) == []


def test_packed_inputs_are_left_to_the_plan() -> None:
    captured = layers(unknown, packed)
    assert strays(captured) == []
    assert len(captured.reasons) == 4, "one for each input"


@pytest.mark.parametrize("pieces", [False, True])
def test_latents_are_projected_before_attention_sees_them(pieces: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, past: Tensor, other: Tensor, weight: Tensor) -> Any:
        latents, turned = torch.cat([past, k], 2), torch.cat([other, v], 2)
        keys, values = F.linear(latents, weight).chunk(2, -1)
        if pieces:
            halves, keys = keys, torch.empty_like(turned.repeat(1, 1, 1, 2))
            keys[..., :8].copy_(halves)
            keys[..., 8:].copy_(turned)
        return sdpa(q, keys, values), latents, turned

    q = tokens(1, dim=16 if pieces else 8)
    args = (q, tokens(1), tokens(1), tokens(9), tokens(9), torch.randn(16, 8))
    captured = capture(fn, *args)
    assert captured.reasons[0].startswith("keys or values are projected from the cache")
    assert strays(captured) == ([] if pieces else ["turned"])


def test_sizes_are_not_followed() -> None:
    """The mask of a known attention is as long as an unknown one's cache."""

    def fn(q: Tensor, k: Tensor, past: Tensor) -> Any:
        keys = torch.cat([past, k], 2)
        mask = torch.ones(keys.shape[2], dtype=torch.bool, device=keys.device)
        return unknown(q, keys, keys), sdpa(q, past, past, mask[None, :-1]), keys

    torch._dynamo.mark_dynamic(past := tokens(9), 2)
    assert strays(capture(fn, tokens(1), tokens(1), past)) == ["keys"]
