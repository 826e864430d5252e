from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apack_compile.passes.draft import ExtendedOutput, PlainOutput

from .capture import capture, check, grown, ours, packed, tokens

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
