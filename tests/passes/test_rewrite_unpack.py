from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apack_compile.cache import PackedKV
from apack_compile.kernels.planes import token_levels
from apack_compile.passes.draft import ExtendedOutput, PlainOutput

from ..helpers import dropped_tokens, fitted_ref
from .capture import CLOSE, POLICY, capture, check, grown, ours, packed, rewrite, run, tokens

sdpa = F.scaled_dot_product_attention


def test_many_tokens_are_attended_dense_and_appended_by_the_runtime() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Any:
        keys, values = grown(pk, pv, k, v)
        return sdpa(q, keys, values), keys, values

    captured = capture(fn, tokens(20), tokens(20), tokens(20), packed(30), packed(30))
    new = check(captured, [PlainOutput, ExtendedOutput, ExtendedOutput])
    assert ours(new) == {"apack::unpack": 2}
    assert new.calls["scaled_dot_product_attention"] == 1
    assert new.interface.appends == (0, 0)


def test_a_cache_that_grows_in_two_ways_gives_two_caches() -> None:
    """Bug: both continuations were written into the same slots of one ring."""

    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Any:
        a, b = grown(pk, pv, k, v), grown(pk, pv, v, k)
        return sdpa(q, *a), sdpa(q, *b), *a, *b

    captured = capture(fn, tokens(1), tokens(1), tokens(1), packed(30), packed(30))
    check(captured, [PlainOutput] * 2 + [ExtendedOutput] * 4)


def test_packed_inputs_that_are_only_read_are_unpacked_where_they_are_read() -> None:
    def fn(x: Tensor, y: Tensor, z: Tensor) -> Any:
        return x.sum(), torch.cat([x, z], 2), y

    captured = capture(fn, packed(30), packed(20), tokens(2))
    new = check(captured, [PlainOutput, PlainOutput])  # Dynamo itself returns y
    assert ours(new) == {"apack::unpack": 1}


def test_a_packed_input_that_is_not_used_leaves_no_trace() -> None:
    def fn(x: Tensor, z: Tensor) -> Any:
        return z + x.shape[1]

    new = check(capture(fn, packed(30), tokens(2)), [PlainOutput])
    assert ours(new) == {}


def thinned(count: int, values: bool) -> PackedKV:
    """A packed cache of which two tokens in five were dropped."""
    return PackedKV.pack(tokens(count), fitted_ref(gain=values, evict=0.4), POLICY)


@pytest.mark.parametrize("tiers", [False, True])
def test_with_tiers_the_importance_of_many_new_tokens_comes_with_them(tiers: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Any:
        keys, values = grown(pk, pv, k, v)
        return sdpa(q, keys, values, mask, scale=0.4), keys, values

    mask = visible(60, 90)
    q, k, past = tokens(60), tokens(60), packed(30)
    values = PackedKV.pack(tokens(30), fitted_ref(ratio=2, tiers=tiers), POLICY)
    captured = capture(fn, q, k, tokens(60), past, values)
    new = rewrite(captured)
    want = {"apack::unpack": 2, **({"apack::importance": 1} if tiers else {})}
    assert ours(new) == want
    keys = torch.cat([past.unpack(), k], 2)
    run(captured, new)
    store = values.store
    assert store is not None
    assert (store.coded, store.length) == (82, 90)
    if not tiers:
        assert store.importance is None
        return
    told = torch.ops.apack.importance(q, keys, mask, False, 0.4)
    shares = told / told[:, 22:].sum(1, keepdim=True)  # of those in the ring and behind it
    torch.testing.assert_close(store.importance[:, :8], shares[:, 82:])
    levels = token_levels(told[:, 22:82], store.ref.layout.later_shares)
    assert torch.equal(store.side.payload[2][:, 22:82, 0], levels)


def visible(new: int, length: int) -> Tensor:
    return torch.ones(new, length, dtype=torch.bool).tril(length - new)[None, None]


MASKS = {
    "none": None, "bool": visible(20, 70),
    "float": torch.randn(2, 1, 20, 70).masked_fill(~visible(20, 70), float("-inf")),
}  # fmt: skip


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_tokens_that_were_dropped_are_hidden_from_dense_attention(
    kind: str, written_out: bool
) -> None:
    mask = MASKS[kind]

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if not written_out:
            return sdpa(q, k, v, mask, scale=0.4)
        scores = q @ k.transpose(-1, -2) * 0.4
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, float("-inf"))
                if mask.dtype == torch.bool
                else scores + mask
            )
        return scores.softmax(-1) @ v

    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Any:
        keys, values = grown(pk, pv, k, v)
        return attention(q, keys, values, mask), keys, values

    pk, pv = thinned(50, False), thinned(50, True)
    assert pk.store is not None and pv.store is not None
    q, k, v = tokens(20), tokens(20), tokens(20)
    captured = capture(fn, q, k, v, pk, pv)
    new = rewrite(captured)
    assert ours(new) == {"apack::unpack": 2, "apack::present": 1, "apack::attend_dense": 1}
    seen = F.pad(~(dropped_tokens(pk.store) | dropped_tokens(pv.store)), (0, 20), value=True)[
        :, None, None
    ]
    assert not seen.all()
    whole = seen.expand(2, 1, 20, 70) if mask is None else mask
    hiding = whole & seen if whole.dtype == torch.bool else whole.masked_fill(~seen, float("-inf"))
    keys, values = torch.cat([pk.unpack(), k], 2), torch.cat([pv.unpack(), v], 2)
    results, _ = run(captured, new)
    torch.testing.assert_close(results[0], sdpa(q, keys, values, hiding, scale=0.4), **CLOSE)
    assert torch.equal(results[1], keys) and torch.equal(results[2], values)
