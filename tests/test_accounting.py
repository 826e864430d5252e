from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apack_compile.accounting import CacheBytes, cache_bytes, coded_part
from apack_compile.cache import PackedKV, Policy

from .helpers import fitted_ref

POLICY = Policy(sinks=2, extra=2, window=8, block=16, chunk=16)
REF = fitted_ref()


def dense(length: int = 40) -> torch.Tensor:
    return torch.randn(2, 2, length, 8)


def packed(length: int = 40, ref: Any = REF) -> PackedKV:
    return PackedKV.pack(dense(length), ref, POLICY)


def test_every_byte_has_its_kind() -> None:
    counted = cache_bytes(packed())
    batch, heads, capacity, dim = 2, 2, 48, 8
    assert counted.dense == batch * heads * 40 * dim * 4
    assert counted.codes == batch * capacity * 4  # 16 components of 2 bits
    assert counted.gains == batch * capacity * 2
    assert counted.exact_tokens == batch * 4 * (heads * dim * 4 + 8)
    assert counted.window == batch * heads * 24 * dim * 4
    assert counted.unpacked == 0
    assert counted.bases == REF.code.nbytes
    assert counted.packed == counted.codes + counted.gains + counted.exact_tokens + counted.window


def test_kinds_add_up_to_the_storage_of_a_handle() -> None:
    for handle in (packed(), PackedKV.pack(dense(), policy=POLICY)):
        assert cache_bytes(handle).packed == handle.packed_bytes
        assert cache_bytes(handle).dense == handle.dense_bytes


def test_an_exact_cache_is_all_codes_and_window() -> None:
    counted = cache_bytes(PackedKV.pack(dense(), policy=POLICY))
    assert counted.codes == 2 * 48 * 16 * 4
    assert (counted.gains, counted.exact_tokens, counted.bases) == (0, 0, 0)


def test_handles_on_one_store_count_its_bytes_once_and_their_dense_bytes_each() -> None:
    handle = packed()
    grown = torch.cat([handle, dense(3)], 2)
    assert grown.store is handle.store
    both = cache_bytes([handle, grown, handle[:, :, :10]])
    assert both.packed == grown.packed_bytes
    assert both.dense == sum(length * 2 * 2 * 8 * 4 for length in (40, 43, 10))
    assert cache_bytes([handle, handle]) == cache_bytes(handle)


def test_layers_with_one_code_count_its_bases_once() -> None:
    one, two = cache_bytes(packed()), cache_bytes([packed(), packed()])
    assert two.packed == 2 * one.packed
    assert two.bases == one.bases
    assert cache_bytes([packed(), packed(ref=fitted_ref())]).bases == 2 * one.bases


def test_plain_tensors_count_by_storage() -> None:
    x = torch.zeros(10, 4)
    counted = cache_bytes([x, x, x[:5], x.t(), torch.zeros(3), torch.tensor([])])
    assert counted.unpacked == 160 + 12
    assert counted.packed == counted.unpacked
    assert counted.dense == 160 + 80 + 160 + 12


def test_the_coded_part_is_without_sinks_window_and_slack() -> None:
    one, other = packed(), packed(72)
    part = coded_part([one.store, other.store])
    assert part is not None
    batch, width, tokens = 2, 2 * 8, (40 - 8 - 2) + (72 - 8 - 2)
    assert part.dense == batch * tokens * width * 2
    assert part.codes == batch * tokens * (4 + 2)
    assert (part.exact, part.kept) == (0, 0)
    assert part.ratio == width * 2 / 6
    assert coded_part([PackedKV.pack(dense(), policy=POLICY).store]) is None
    assert coded_part([packed(9).store]) is None, "no more than sinks and window"


def test_tokens_kept_exact_beyond_the_sinks_are_part_of_the_bytes() -> None:
    x = dense()
    x[0, :, 20] = float("nan")
    part = coded_part([PackedKV.pack(x, REF, POLICY).store])
    assert part is not None
    assert (part.exact, part.kept) == (16 * 2, 0.5)  # one token of one of two sequences
    assert part.packed == 2 * 30 * 6 + 32
    assert str(part) == (
        "4.90x of 16-bit numbers, gains counted; 0.5 tokens a sequence and side kept exact as "
        "well, 8.2% of its bytes"
    )


class Node:
    """An object that leads to itself."""

    def __init__(self, keys: Any) -> None:
        self.keys = keys
        self.me = self
        self.name = "layer"
        self.weights = torch.nn.Linear(2, 2)


CONTAINERS: dict[str, Any] = {
    "tensor": lambda x, y: [x, y],
    "legacy": lambda x, y: ((x, y),),
    "dict": lambda x, y: {"a": {"k": x}, "b": y},
    "object": lambda x, y: Node([x, Node(y)]),
    "namespace": lambda x, y: SimpleNamespace(layers=[SimpleNamespace(keys=x, values=y)]),
    "set": lambda x, y: {x, frozenset([y])},
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_any_nesting_is_looked_into(make: Any) -> None:
    x, y = packed(), dense()
    counted = cache_bytes(make(x, y))
    assert counted.packed == x.packed_bytes + y.nbytes
    assert counted.dense == x.dense_bytes + y.nbytes


def test_a_hugging_face_cache_is_looked_into() -> None:
    transformers = pytest.importorskip("transformers")
    cache = transformers.DynamicCache()
    keys, values = dense(), dense()
    cache.update(keys, values, 0)
    assert cache_bytes(cache).dense == keys.nbytes + values.nbytes
    cache.layers[0].keys = PackedKV.pack(keys, REF, POLICY)
    counted = cache_bytes(cache)
    assert counted.unpacked == values.nbytes
    assert counted.packed == values.nbytes + cache.layers[0].keys.packed_bytes


@pytest.mark.parametrize("nothing", [None, [], {}, "text", 3, torch.nn.Linear(4, 4)])
def test_what_has_no_tensors_takes_no_bytes(nothing: Any) -> None:
    counted = cache_bytes(nothing)
    assert counted == CacheBytes(0, 0, 0, 0, 0, 0, 0)
    assert counted.packed == 0
    assert "1.00x" in str(counted)


def test_a_copy_counts_on_its_own() -> None:
    handle = packed()
    twin = copy.deepcopy(handle)
    both = cache_bytes([handle, twin])
    assert both.packed == handle.packed_bytes + twin.packed_bytes
    assert both.bases == cache_bytes(handle).bases


def test_the_text_names_every_kind() -> None:
    text = str(CacheBytes(8_000_000, 1_000_000, 100_000, 200_000, 300_000, 400_000, 50_000))
    assert text == (
        "8.00 MB dense, 2.00 MB packed (4.00x smaller): codes 1.00 MB, gains 0.10 MB, "
        "exact tokens 0.20 MB, window 0.30 MB, not packed 0.40 MB; bases, per model: 0.05 MB"
    )
