from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apack_compile.cache import PackedKV
from apack_compile.passes.draft import AppendedOutput, PlainOutput

from ..helpers import fitted_ref
from .capture import (
    POLICY,
    capture,
    check,
    grown,
    ours,
    packed,
    repeat_kv,
    rewrite,
    tokens,
)

sdpa = F.scaled_dot_product_attention

GONE = ("cat", "expand", "reshape", "repeat_interleave", "scaled_dot_product_attention", "getitem")

REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat_kv": repeat_kv,
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "none": lambda x: x,
}


@pytest.mark.parametrize("repeat", REPEATS.values(), ids=REPEATS)
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_decode_appends_and_attends_and_nothing_else_is_left(
    repeat: Callable[[Tensor], Tensor], mask: torch.dtype | None, count: int
) -> None:
    """Bug: a size of the cat that nobody read kept the cat and an unpack of the whole cache."""
    heads = 2 if repeat is REPEATS["none"] else 4

    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, m: Tensor | None) -> Any:
        keys, values = grown(pk, pv, k, v)
        out = sdpa(q, repeat(keys), repeat(values), m, scale=0.3)
        return out.transpose(1, 2), keys, values

    seen = torch.rand(2, 1, count, 30 + count) < 0.8
    given = None if mask is None else seen if mask == torch.bool else torch.randn(seen.shape)
    new = (tokens(count, heads), tokens(count), tokens(count))
    captured = capture(fn, *new, packed(30), packed(30), given)
    assert captured.treatments == ["attend"]
    new = check(captured, [PlainOutput, AppendedOutput, AppendedOutput])
    assert ours(new) == {"apack::append_": 2, "apack::attend": 1}
    assert not any(new.calls[name] for name in GONE)
    assert new.interface.appends == (count, count)
    assert [r.matched for r in new.reports] == [1, 0, 0]


@pytest.mark.parametrize("in_step", [False, True])
def test_two_layers_are_rewritten_each_on_its_own_cache(in_step: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, *past: Tensor) -> Any:
        a, b = grown(past[0], past[1], k, v), grown(past[2], past[3], v, k)
        q = sdpa(q, *a)
        return sdpa(q, *b), *a, *b

    captured = capture(fn, tokens(1), tokens(1), tokens(1), *(packed(30) for _ in range(4)))
    new = check(captured, [PlainOutput] + [AppendedOutput] * 4, in_step)
    # In step, all caches read one tensor of lengths.
    assert new.calls["aten::select.int"] == (0 if in_step else 6)
    assert ours(new) == {"apack::append_": 4, "apack::attend": 2}
    assert new.calls["cat"] == 0


def test_layers_that_share_a_cache_append_once() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Any:
        keys, values = grown(pk, pv, k, v)
        return sdpa(sdpa(q, keys, values), keys, values), keys, values

    captured = capture(fn, tokens(1), tokens(1), tokens(1), packed(30), packed(30))
    new = check(captured, [PlainOutput, AppendedOutput, AppendedOutput])
    assert ours(new) == {"apack::append_": 2, "apack::attend": 2}


def test_one_cache_for_keys_and_values_appends_once() -> None:
    def fn(q: Tensor, k: Tensor, past: Tensor) -> Any:
        keys = torch.cat([past, k], 2)
        return sdpa(q, keys, keys), keys

    new = check(capture(fn, tokens(1), tokens(1), packed(30)), [PlainOutput, AppendedOutput])
    assert ours(new) == {"apack::append_": 1, "apack::attend": 1}


def tiered(count: int = 30) -> PackedKV:
    """Values whose later tokens have bits by attention."""
    return PackedKV.pack(tokens(count), fitted_ref(ratio=2, tiers=True), POLICY)


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_values_in_tiers_weigh_the_tokens_of_their_ring(masked: bool, in_step: bool) -> None:
    """Each layer those that its own queries see; what is added to scores is made once."""

    def fn(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None, *past: Tensor) -> Any:
        a, b = grown(past[0], past[1], k, v), grown(past[2], past[3], v, k)
        q = sdpa(q, repeat_kv(a[0]), repeat_kv(a[1]), m, scale=0.3)
        return sdpa(q, repeat_kv(b[0]), repeat_kv(b[1]), m, scale=0.3), *a, *b

    caches = [packed(30), tiered(), packed(30), tiered()]
    mask = torch.rand(2, 1, 2, 32) < 0.8 if masked else None
    q = tokens(2, 4)
    captured = capture(fn, q, tokens(2), tokens(2), mask, *caches)
    stores = [cache.store for cache in caches]
    for store in (stores[1], stores[3]):
        assert store.importance is not None
        store.importance.copy_(torch.rand(2, POLICY.ring))
    before = [None if s.importance is None else s.importance.clone() for s in stores]
    assert before[0] is None and before[2] is None
    new = check(captured, [PlainOutput] + [AppendedOutput] * 4, in_step)
    shared = 1 if in_step else 2
    assert ours(new) == {
        "apack::append_": 4, "apack::attend": 2, "apack::update_importance_": 2,
        "apack::score_bias": shared,
    }  # fmt: skip
    lengths = torch.tensor([22, 10])
    bias = torch.ops.apack.score_bias(mask, lengths, 0, POLICY.ring, torch.float32)
    ring = stores[0].side.ring
    want = torch.ops.apack.running_importance(before[1], q, bias, ring, lengths, 0.3)
    assert stores[1].importance is not None
    torch.testing.assert_close(stores[1].importance, want)
    assert not torch.equal(want, stores[3].importance)


def test_layers_that_share_values_in_tiers_weigh_them_once() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Any:
        keys, values = grown(pk, pv, k, v)
        return sdpa(sdpa(q, keys, values), keys, values), keys, values

    captured = capture(fn, tokens(1), tokens(1), tokens(1), packed(30), tiered())
    new = check(captured, [PlainOutput, AppendedOutput, AppendedOutput])
    assert new.calls["apack::update_importance_"] == 1


def test_values_in_tiers_that_do_not_grow_are_not_weighed() -> None:
    def fn(q: Tensor, pk: Tensor, pv: Tensor) -> Any:
        return sdpa(q, pk, pv)

    fixed = PackedKV.pack(tokens(30), fitted_ref(ratio=2, tiers=True), POLICY.fixed)
    captured = capture(fn, tokens(1), packed(30), fixed)
    assert captured.treatments == ["attend"]
    assert ours(rewrite(captured)) == {"apack::attend": 1}


def test_a_cat_that_something_else_reads_too_is_still_right() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Any:
        keys, values = grown(pk, pv, k, v)
        return sdpa(q, keys, values), keys, values, keys.sum(), values[:, :, -3:]

    captured = capture(fn, tokens(1), tokens(1), tokens(1), packed(30), packed(30))
    kinds = [PlainOutput, AppendedOutput, AppendedOutput, PlainOutput, PlainOutput]
    new = check(captured, kinds)
    assert ours(new) == {"apack::append_": 2, "apack::attend": 1, "apack::unpack": 2}
    assert new.calls["cat"] == 2


def test_new_tokens_that_are_results_themselves_are_still_results() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Any:
        k = k + 1
        keys, values = grown(pk, pv, k, v)
        return keys, sdpa(q, keys, values), values, k

    captured = capture(fn, tokens(1), tokens(1), tokens(1), packed(30), packed(30))
    check(captured, [AppendedOutput, PlainOutput, AppendedOutput, PlainOutput])


@pytest.mark.parametrize("in_step", [False, True])
def test_a_cache_that_does_not_grow_is_attended_to_as_it_is(in_step: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, *past: Tensor) -> Any:
        keys, values = grown(past[0], past[1], k, v)
        q = sdpa(q, keys, values)
        q = sdpa(q, past[2], past[3])
        return sdpa(q, past[4], past[5]), keys, values

    caches = [packed(30), packed(30), *(packed(21) for _ in range(4))]
    captured = capture(fn, tokens(1), tokens(1), tokens(1), *caches)
    assert captured.treatments == ["attend"] * 3
    assert captured.plan.fixed == (False, False, True, True, True, True)
    new = check(captured, [PlainOutput, AppendedOutput, AppendedOutput], in_step)
    # In step, those that grow read one tensor of lengths, and those that do not read another.
    assert new.calls["aten::select.int"] == (0 if in_step else 5)
    assert ours(new) == {"apack::append_": 2, "apack::attend": 3}
    assert new.calls["scaled_dot_product_attention"] == 0
    assert new.interface.appends == (1, 1, 0, 0, 0, 0)


@pytest.mark.parametrize("repeat", [REPEATS["none"], repeat_kv], ids=["MHA", "GQA"])
def test_an_output_lies_in_memory_as_that_of_sdpa(repeat: Callable[[Tensor], Tensor]) -> None:
    """Bug: models that ``view`` what they have transposed back stopped at steps of many tokens."""

    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Any:
        keys, values = grown(pk, pv, k, v)
        out = sdpa(q.transpose(1, 2), repeat(keys), repeat(values))
        return out.transpose(1, 2).view(2, 5, -1), keys, values

    heads = 2 if repeat is REPEATS["none"] else 4
    q = torch.randn(2, 5, heads, 8)  # SDPA answers in the layout of the queries
    captured = capture(fn, q, tokens(5), tokens(5), packed(30), packed(30))
    new = check(captured, [PlainOutput, AppendedOutput, AppendedOutput])
    assert ours(new) == {"apack::append_": 2, "apack::attend": 1}
