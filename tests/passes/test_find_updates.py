from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apack_compile.passes.find_updates import MADE, PREALLOCATED

from .capture import Captured, capture, packed, tokens

sdpa = F.scaled_dot_product_attention

NOT_PROJECTED = "keys and values are other tokens than the queries, and no projection makes them"
Grow = Callable[[Tensor, Tensor], Tensor]


def decode(grow: Grow = lambda past, new: torch.cat([past, new], 2)) -> Callable[..., Any]:
    def fn(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
        keys, values = grow(past_k, k), grow(past_v, v)
        return sdpa(q, keys, values), keys, values

    return fn


def kinds(captured: Captured) -> list[tuple[str, str]]:
    return [(s.cached.k.kind, s.cached.v.kind) for s in captured.plan.sites]


def reasons(captured: Captured) -> list[str]:
    """Why ``find_updates`` left sites alone; exactly one reason for each."""
    report = captured.plan.reports[1]
    assert report.name == "find_updates"
    assert report.matched == len(captured.plan.sites)
    return [skip.reason for skip in report.skipped]


GROWN: dict[str, Grow] = {
    "dim 2": lambda past, new: torch.cat([past, new], 2),
    "dim -2": lambda past, new: torch.cat([past, new], -2),
    "named dim": lambda past, new: torch.cat([past, new], dim=-2),
    "all named": lambda past, new: torch.cat(tensors=[past, new], dim=2),
    "tuple": lambda past, new: torch.cat((past, new), dim=2),
    "concat": lambda past, new: torch.concat([past, new], 2),
}


@pytest.mark.parametrize("grow", GROWN.values(), ids=GROWN)
@pytest.mark.parametrize("make", [tokens, packed])
def test_a_growing_cache_is_found(grow: Grow, make: Callable[[int], Tensor]) -> None:
    captured = capture(decode(grow), tokens(1), tokens(1), tokens(1), make(40), make(40))
    kind = "packed" if make is packed else "dense"
    assert kinds(captured) == [(kind, kind)]
    assert reasons(captured) == []
    site = captured.plan.sites[0].cached
    for update in (site.k, site.v):
        assert list(update.node.all_input_nodes) == [update.past, update.new]
        assert update.past.op == "placeholder"
        assert update.new.meta["example_value"].shape[2] == 1
    assert site.k.past is not site.v.past


def test_a_first_prefill_behind_an_empty_tensor_is_found() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Any:
        keys, values = (torch.cat([torch.tensor([]), x], -2) for x in (k, v))
        return sdpa(q, keys, values), keys, values

    captured = capture(fn, tokens(6), tokens(6), tokens(6))
    assert kinds(captured) == [("empty", "empty")]
    assert captured.plan.sites[0].cached.k.past is None


def test_an_empty_tensor_that_is_an_input_is_an_empty_past() -> None:
    empty = torch.tensor([])
    captured = capture(decode(), tokens(6), tokens(6), tokens(6), empty, empty.clone())
    assert kinds(captured) == [("empty", "empty")]


def test_a_first_prefill_without_a_cat_is_found() -> None:
    captured = capture(lambda q, k, v: (sdpa(q, k * 2, v * 2), k * 2), *[tokens(6)] * 3)
    assert reasons(captured) == ["no cache: keys and values are not stored"]

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Any:
        keys, values = k * 2, v * 2
        return sdpa(q, keys, values), keys, values

    captured = capture(fn, tokens(6), tokens(6), tokens(6))
    assert kinds(captured) == [("empty", "empty")]
    assert captured.plan.sites[0].cached.k.node is captured.plan.sites[0].cached.k.new


def test_a_first_prefill_of_keys_that_are_turned_in_part_is_found() -> None:
    """Bug: keys put together along head_dim were taken for no cache."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Any:
        keys, values = torch.cat([k[..., :4] * 2, k[..., 4:]], -1), v * 2
        return sdpa(q, keys, values), keys, values

    captured = capture(fn, tokens(6), tokens(6), tokens(6))
    assert kinds(captured) == [("empty", "empty")]


LEFT_ALONE: dict[str, tuple[Grow, str]] = {
    "last dimension": (
        lambda past, new: torch.cat([past[..., :4], past[..., 4:]], -1),
        NOT_PROJECTED,
    ),
    "batch": (
        lambda past, new: torch.cat([past, past]),
        "no cache: made by a cat of halves, not of tokens",
    ),
    "three tensors": (lambda past, new: torch.cat([past, new, new], 2), "cat of 3 tensors"),
    "computed past": (
        lambda past, new: torch.cat([past * 2, new], 2), "the past is computed in the graph"
    ),
    "joined with other tokens": (
        lambda past, new: torch.cat([torch.cat([past, new], 2), new * 2], 2),
        "the cache is joined with other keys or values: left dense",
    ),
    "new tokens in front": (
        lambda past, new: torch.cat([new * 2, past], 2), "the past is computed in the graph"
    ),
    "not grown": (
        lambda past, new: past,
        "keys or values are an input that this graph does not grow (cross-attention?)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("grow", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_is_no_growing_cache_is_left_alone(grow: Grow, reason: str) -> None:
    batch = 4 if grow is LEFT_ALONE["batch"][0] else 2
    captured = capture(
        decode(grow), tokens(3, batch=batch), tokens(3), tokens(3), tokens(40), tokens(40)
    )
    assert kinds(captured) == []
    assert reasons(captured) == [reason]


def by_index(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Any:
    where = torch.tensor([5])
    keys.index_copy_(2, where, k)
    values.index_copy_(2, where, v)
    return sdpa(q, keys, values)


def by_slices(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Any:
    keys[:, :, 5:6], values[:, :, 5:6] = k, v
    return sdpa(q, keys[:, :, :6], values[:, :, :6])


def beside(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Any:
    """A prefill: attention reads new tokens as they are."""
    k, v = k * 1, v * 1
    keys[:, :, :1], values[:, :, :1] = k, v
    return sdpa(q, k, v)


def the_last(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Any:
    k, v = k * 1, v * 1
    keys[:, :, :1].copy_(k[:, :, -1:])
    values[:, :, :1].copy_(v[:, :, -1:])
    return sdpa(q, k, v)


def made_here(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Any:
    keys, values = torch.zeros(2, 2, 40, 8), torch.zeros(2, 2, 40, 8)
    return by_slices(q, k, v, keys, values), keys, values


def made_and_read_whole(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Any:
    keys, values = k.new_zeros(2, 2, 40, 8), torch.zeros_like(values)
    return by_index(q, k, v, keys, values), keys, values


@pytest.mark.parametrize(
    "fn", [by_index, by_slices, beside, the_last, made_here, made_and_read_whole]
)
def test_a_preallocated_cache_is_left_alone(fn: Callable[..., Any]) -> None:
    captured = capture(fn, tokens(1), tokens(1), tokens(1), tokens(40), tokens(40))
    assert kinds(captured) == []
    assert reasons(captured) == [PREALLOCATED]
    assert "memory does not shrink" in PREALLOCATED


def test_keys_put_together_for_attention_alone_are_no_preallocated_cache() -> None:
    """As DeepSeek-V3 makes them of its latents."""

    def fn(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Any:
        grown = torch.cat([past, k], 2)
        keys = grown.new_empty(2, 2, 41, 8)
        keys[..., :4], keys[..., 4:] = grown[..., :4] * 2, grown[..., 4:]
        return sdpa(q, keys, keys * 1), grown

    captured = capture(fn, tokens(1), tokens(1), tokens(1), tokens(40))
    assert kinds(captured) == []
    assert PREALLOCATED not in reasons(captured)


def test_new_tokens_put_together_in_place_are_no_preallocated_cache() -> None:
    """Later steps grow it by a cat, and pack it."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Any:
        keys, values = torch.empty(2, 2, 3, 8), torch.empty(2, 2, 3, 8)
        keys[..., :4], keys[..., 4:] = k[..., :4], k[..., 4:] * 2
        values[...] = v
        return sdpa(q, keys, values), keys, values

    captured = capture(fn, tokens(3), tokens(3), tokens(3))
    assert kinds(captured) == []
    assert reasons(captured) == ["the graph writes to the grown cache in place: left dense"]


def test_a_cache_behind_other_tokens_is_joined_and_no_sliding_window() -> None:
    """Bug: GIT of transformers 4 puts its image before the cache, which was reported as sliding."""

    def fn(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
        keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return sdpa(q, torch.cat([k * 2, keys], 2), torch.cat([v * 2, values], 2)), keys, values

    captured = capture(fn, *[tokens(1)] * 3, tokens(40), tokens(40))
    assert kinds(captured) == []
    assert reasons(captured) == ["the cache is joined with other keys or values: left dense"]


@pytest.mark.parametrize("repeat", [
    lambda x: x.repeat(1, 2, 1, 1),
    lambda x: x[:, None].expand(2, 2, 2, 9, 8).reshape(2, 4, 9, 8),
    lambda x: x.index_select(1, torch.tensor([0, 1, 0, 1])),
], ids=["repeat", "expand", "index_select"])  # fmt: skip
def test_a_prefill_of_heads_in_another_order_is_not_without_a_cache(
    repeat: Callable[[Tensor], Tensor],
) -> None:
    """Bug: the reason was that keys and values are not stored."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Any:
        k, v = k * 1, v * 1
        return sdpa(q, repeat(k), repeat(v)), k, v

    captured = capture(fn, tokens(9, 4), tokens(9), tokens(9))
    assert kinds(captured) == []
    assert reasons(captured) == [MADE]


def test_vision_attention_is_left_alone() -> None:
    w = torch.randn(3, 16, 16)

    def fn(x: Tensor, w: Tensor) -> Tensor:
        q, k, v = (F.linear(x, w[i]).view(2, 9, 2, 8).transpose(1, 2) for i in range(3))
        return sdpa(q, k, v)

    captured = capture(fn, torch.randn(2, 9, 16), w)
    assert kinds(captured) == []
    assert reasons(captured) == ["no cache: keys and values are not stored"]


def projected(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w).unflatten(-1, (2, 8)).transpose(1, 2)


def attention(x: Tensor, y: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Any:
    q, k, v = projected(x, wq), projected(y, wk), projected(y, wv)
    return sdpa(q, k, v), k, v


WEIGHTS = [torch.randn(16, 16) for _ in range(3)]


@pytest.mark.parametrize("length", [6, 9])
def test_cross_attention_is_found_and_named_after_its_own_weights(length: int) -> None:
    captured = capture(attention, torch.randn(2, 6, 16), torch.randn(2, length, 16), *WEIGHTS)
    assert kinds(captured) == [("empty", "empty")]
    cached = captured.plan.sites[0].cached
    assert cached.crosses
    arguments = [n for n in captured.graph.nodes if n.op == "placeholder"]
    assert captured.args[arguments.index(cached.k.weight)] is WEIGHTS[1]


@pytest.mark.parametrize("make", [tokens, packed])
def test_keys_that_do_not_grow_are_read_as_they_are_if_they_are_packed(
    make: Callable[[int], Tensor],
) -> None:
    captured = capture(lambda q, k, v: sdpa(q, k, v), tokens(1), make(40), make(40))
    if make is tokens:
        assert reasons(captured) == [LEFT_ALONE["not grown"][1]]
        return
    assert reasons(captured) == [] and kinds(captured) == [("fixed", "fixed")]
    cached = captured.plan.sites[0].cached
    assert cached.k.past is cached.k.node and not cached.crosses
    assert captured.plan.fixed == (True, True) and captured.plan.appended == (0, 0)


def test_a_packed_cache_that_is_read_and_written_is_left_alone() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k.mul_(2)
        return sdpa(q, k, v)

    captured = capture(fn, tokens(1), packed(40), packed(40))
    assert reasons(captured) == ["the graph writes to the grown cache in place: left dense"]


def test_self_attention_shares_its_hidden_state_and_names_its_weights() -> None:
    x = torch.randn(2, 6, 16)
    captured = capture(lambda x, *w: attention(x, x, *w), x, *WEIGHTS)
    assert kinds(captured) == [("empty", "empty")]
    cached = captured.plan.sites[0].cached
    arguments = [n for n in captured.graph.nodes if n.op == "placeholder"]
    for update, weight in ((cached.k, WEIGHTS[1]), (cached.v, WEIGHTS[2])):
        assert captured.args[arguments.index(update.weight)] is weight


def test_projections_with_named_arguments_are_read() -> None:
    """Bug: they stopped the compilation with an IndexError."""

    def fn(x: Tensor, y: Tensor, wq: Tensor, wk: Tensor) -> Any:
        q, k = (F.linear(input=a, weight=w).view(2, 6, 2, 8).transpose(1, 2) for a, w in
                ((x, wq), (y, wk)))  # fmt: skip
        values = k * 2
        return sdpa(q, k, values), k, values

    captured = capture(fn, torch.randn(2, 6, 16), torch.randn(2, 6, 16), *WEIGHTS[:2])
    assert captured.plan.sites[0].cached.crosses


def test_products_with_weights_are_projections() -> None:
    """Bug: layers that are written so had no name, and every graph fitted codes of its own."""

    def fn(x: Tensor, y: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Any:
        q, k, v = x @ wq.T, torch.matmul(y, wk.t()), y.matmul(wv)
        q, k, v = (z.unflatten(-1, (2, 8)).transpose(1, 2) for z in (q, k, v))
        k = k * (y.sum(-1)[:, None, :, None] * torch.ones(1, 1, 1, 8)).cos()
        return sdpa(q, k, v), k, v

    x = torch.randn(2, 6, 16)
    captured = capture(lambda x, *w: fn(x, x, *w), x, *WEIGHTS)
    cached = captured.plan.sites[0].cached
    arguments = [n for n in captured.graph.nodes if n.op == "placeholder"]
    for update, weight in ((cached.k, WEIGHTS[1]), (cached.v, WEIGHTS[2])):
        assert captured.args[arguments.index(update.weight)] is weight
    assert not cached.crosses
    assert capture(fn, x, x + 1, *WEIGHTS).plan.sites[0].cached.crosses


def test_queries_of_low_rank_still_share_the_hidden_state() -> None:
    def fn(x: Tensor, down: Tensor, up: Tensor, wk: Tensor, wv: Tensor) -> Any:
        return attention(F.linear(x, down), x, up, wk, wv)

    down, up = torch.randn(4, 16), torch.randn(16, 4)
    captured = capture(fn, torch.randn(2, 6, 16), down, up, *WEIGHTS[1:])
    assert kinds(captured) == [("empty", "empty")]


def test_keys_and_values_of_different_pasts_are_left_alone() -> None:
    args = (tokens(1), tokens(1), tokens(1), packed(40), tokens(40))
    captured = capture(decode(), *args)
    assert reasons(captured) == ["keys grow from a packed past and values from a dense one"]


def test_keys_and_values_that_grow_differently_are_left_alone() -> None:
    captured = capture(decode(), tokens(1), tokens(1), tokens(2), tokens(40), tokens(39))
    assert reasons(captured) == ["keys and values do not grow by the same number of tokens"]


def test_a_packed_cache_of_another_dtype_is_left_alone() -> None:
    """Bug: the grown cache kept its dtype where ``cat`` promotes."""

    def fn(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
        keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return sdpa(q, keys, values), keys, values

    captured = capture(fn, tokens(1), tokens(1), tokens(1), packed(40).half(), packed(40).half())
    assert reasons(captured) == ["the packed cache and its new tokens differ in dtype: made dense"]
