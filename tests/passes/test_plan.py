from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apack_compile.passes.plan import MAX_QUERIES

from .capture import capture, packed, tokens

sdpa = F.scaled_dot_product_attention


def decode(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, causal: bool = False
) -> Any:
    keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    return sdpa(q, keys, values, is_causal=causal), keys, values


@pytest.mark.parametrize("count", [1, 2, MAX_QUERIES])
def test_a_few_new_tokens_on_a_packed_cache_are_attended_on_codes(count: int) -> None:
    captured = capture(decode, *[tokens(count)] * 3, packed(40), packed(40))
    assert captured.treatments == ["attend"]
    assert captured.reasons == []
    assert [n.name for n in captured.plan.handles] == ["l_past_k_", "l_past_v_"]
    assert len(captured.plan.updates) == 2
    assert captured.plan.having("attend") == captured.plan.sites
    assert captured.plan.having("encode") == ()


def test_many_new_tokens_on_a_packed_cache_are_attended_dense() -> None:
    captured = capture(decode, *[tokens(17)] * 3, packed(40), packed(40))
    assert captured.treatments == ["unpack"]
    assert captured.reasons == ["17 new tokens on a packed cache: dense attention"]


def thrice(x: Tensor, *past: Tensor) -> Any:
    return decode(x, x * 2, x * 3, *past)


@pytest.mark.parametrize("count", [5, 17])
def test_a_small_number_of_new_tokens_that_varies_is_held_to_its_value(count: int) -> None:
    """Bug: every step of assisted decoding attended to a dense copy."""
    x = tokens(count)
    torch._dynamo.maybe_mark_dynamic(x, 2)
    captured = capture(thrice, x, packed(40), packed(40))
    if count > MAX_QUERIES:
        assert captured.treatments == ["unpack"]
        assert captured.reasons == ["over 16 new tokens on a packed cache: dense attention"]
        return
    assert captured.treatments == ["attend"] and captured.reasons == []
    assert captured.plan.appended == (count, count)


def test_a_number_of_new_tokens_that_the_user_marked_is_not_held_to_a_value() -> None:
    x = tokens(5)
    torch._dynamo.mark_dynamic(x, 2)
    captured = capture(thrice, x, packed(40), packed(40))
    assert captured.treatments == ["unpack"]
    assert captured.reasons == [
        "the number of new tokens is not known when compiling: dense attention"
    ]


def test_sizes_that_are_not_known_when_compiling_leave_a_site_alone() -> None:
    captured = capture(decode, *[tokens(5)] * 3, packed(40), packed(40), dynamic=True)
    assert captured.treatments == []
    assert captured.reasons[0] == "head_dim is not known when compiling"
    assert set(captured.reasons[1:]) == {"a packed input that no attention here grows: unpacked"}


def test_a_causal_call_on_a_packed_cache_is_attended_dense() -> None:
    def fn(*args: Tensor) -> Any:
        return decode(*args, causal=True)

    captured = capture(fn, *[tokens(2)] * 3, packed(40), packed(40))
    assert captured.treatments == ["unpack"]
    assert captured.reasons == ["is_causal on a cache: dense attention"]


def test_queries_that_are_not_the_new_tokens_are_attended_dense() -> None:
    captured = capture(decode, tokens(1), tokens(2), tokens(2), packed(40), packed(40))
    assert captured.treatments == ["unpack"]
    assert captured.reasons == ["queries and new keys are different in number: dense attention"]


@pytest.mark.parametrize("count", [1, 40])
def test_dense_and_empty_pasts_are_encoded(count: int) -> None:
    captured = capture(decode, *[tokens(count)] * 3, tokens(40), tokens(40))
    assert captured.treatments == ["encode"]
    assert captured.reasons == []
    assert captured.plan.handles == ()


def test_a_packed_input_that_nothing_grows_is_named() -> None:
    captured = capture(lambda x: x.sum(), packed(40))
    assert captured.treatments == []
    assert captured.reasons == ["a packed input that no attention here grows: unpacked"]
    assert captured.plan.skipped[0].where == captured.plan.handles[0].name


@pytest.mark.parametrize(("count", "treatment"), [(1, "attend"), (16, "attend"), (17, "unpack")])
def test_a_packed_cache_that_does_not_grow_is_read_as_it_is(count: int, treatment: str) -> None:
    captured = capture(F.scaled_dot_product_attention, tokens(count), packed(40), packed(40))
    assert captured.treatments == [treatment]
    more = [] if treatment == "attend" else ["17 new tokens on a packed cache: dense attention"]
    assert captured.reasons == more


def test_a_handle_that_grows_in_two_ways_is_attended_dense() -> None:
    """Bug: both continuations were written into the same slots of one ring."""

    def fn(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
        return *decode(q, k, v, past_k, past_v), *decode(q, v, k, past_k, past_v)

    captured = capture(fn, *(tokens(1) for _ in range(3)), packed(40), packed(40))
    assert captured.treatments == ["unpack", "unpack"]
    assert set(captured.reasons) == {"the cache grows in two ways at once: dense attention"}


def test_a_handle_that_is_keys_and_values_grows_once() -> None:
    def fn(q: Tensor, k: Tensor, past: Tensor) -> Any:
        keys = torch.cat([past, k], 2)
        return sdpa(q, keys, keys), keys

    captured = capture(fn, tokens(1), tokens(1), packed(40))
    assert captured.treatments == ["attend"]
    assert len(captured.plan.updates) == 1


def test_two_layers_that_share_a_cache_have_its_updates_once() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
        keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return sdpa(sdpa(q, keys, values), keys, values), keys, values

    captured = capture(fn, *[tokens(1)] * 3, packed(40), packed(40))
    assert captured.treatments == ["attend", "attend"]
    assert len(captured.plan.updates) == 2


def test_a_packed_input_whose_size_alone_is_read_is_nothing_to_report() -> None:
    """Bug: graph breaks leave such graphs, and the report called their caches unpacked."""

    def place(x: Tensor, past: Tensor) -> Any:
        return x + past.numel()

    captured = capture(place, tokens(1), packed(40))
    assert len(captured.plan.handles) == 1
    assert captured.reasons == []
