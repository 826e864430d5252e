"""Every member of the family of codes, chosen by options, through the compiled backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import apack_compile
from apack_compile import PackedKV
from apack_compile.accounting import cache_bytes

from .. import zoo

FITTED = {"ratio": 4, "fit_tokens": 64, "inner": "eager"}
MEMBERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "pre-rope": (
        {**FITTED, "k_code": "pre-rope"},
        "rotary=16",
        "gain=1",
    ),
    "hadamard": (
        {**FITTED, "v_basis": "hadamard"}, "gain=0", "groups=2",
    ),
    "tiers": (
        {**FITTED, "tiers": True}, "transform:", "tiered:",
    ),
    "int8": (
        {"codec": "int8", "inner": "eager"},
        "transform:heads=2,dim=16,groups=2,r8=16,r4=0,r2=0,gain=2",
        "transform:heads=2,dim=16,groups=2,r8=16,r4=0,r2=0,gain=2",
    ),
    "int4": (
        {"codec": "int4", "inner": "eager"},
        "transform:heads=2,dim=16,groups=2,r8=0,r4=16,r2=0,gain=2",
        "transform:heads=2,dim=16,groups=2,r8=0,r4=16,r2=0,gain=2",
    ),
    "paper": (
        {"codec": "svd", "inner": "eager"},
        "lowrank:heads=2,dim=16,rank=8,rotary=16", "lowrank:heads=2,dim=16,rank=8",
    ),
    "separate ranks": (
        {"codec": "svd", "k_rank": 12, "v_rank": 20, "inner": "eager"},
        "lowrank:heads=2,dim=16,rank=12,rotary=16", "lowrank:heads=2,dim=16,rank=20",
    ),
}  # fmt: skip


KINDS = ("pre-rope", "tiers", "int4", "paper")
"""One of each kind of layout, for the tests that take long."""


def padded_case() -> zoo.Case:
    case = zoo.llama(batch=2, padded=True, text=150)
    mask = case.inputs["attention_mask"]
    case.inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return case


def prefilled(compiled: Any, inputs: dict[str, Tensor]) -> Any:
    cache = transformers.DynamicCache()
    for _ in range(2):  # the first time it is fitted, if it is
        cache = transformers.DynamicCache()
        compiled(**inputs, past_key_values=cache)
    return cache


def unpacked(cache: Any) -> Any:
    dense = transformers.DynamicCache()
    for i, layer in enumerate(cache.layers):
        dense.update(layer.keys.unpack(), layer.values.unpack(), i)
    return dense


def step(model: Any, cache: Any, mask: Tensor, token: int = 11) -> tuple[Tensor, Tensor]:
    """One more token for every row: its logits and the mask after it."""
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    ids = torch.full((len(mask), 1), token)
    positions = mask.sum(1, keepdim=True) - 1
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return out.logits[:, -1], mask


@torch.no_grad()
@pytest.mark.parametrize("name", MEMBERS)
def test_compiled_steps_give_what_dense_attention_to_the_decoded_cache_gives(name: str) -> None:
    options, k_spec, v_spec = MEMBERS[name]
    case = padded_case()
    compiled = torch.compile(case.model, backend="attentionpack", options=options)
    cache = prefilled(compiled, case.inputs)
    layer = cache.layers[1]
    assert k_spec in layer.keys.store.ref.layout.spec
    assert v_spec in layer.values.store.ref.layout.spec
    mask, reference = case.inputs["attention_mask"], unpacked(cache)
    for _ in range(3):
        expected, _ = step(case.model, reference, mask)
        got, mask = step(compiled, cache, mask)
        # float32 rounding of sums taken in another order
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert apack_compile.report(case.model).attends == 2 * 3


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_a_padded_row_gets_the_codes_that_it_would_get_alone(name: str) -> None:
    case = padded_case()
    compiled = torch.compile(case.model, backend="attentionpack", options=MEMBERS[name][0])
    together = prefilled(compiled, case.inputs)
    alone = transformers.DynamicCache()
    ids = case.inputs["input_ids"][:1, 5:]
    compiled(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=alone)
    for mine, theirs in zip(alone.layers, together.layers, strict=True):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            a, b = a.unpack(), b.unpack()[:1, :, 5:]
            # a number on the border of two codes may fall on either side
            assert ((a - b).abs() > 1e-3 * b.abs().amax()).float().mean() < 0.01


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_long_decoding_flushes_into_codes_and_stays_near_the_dense_cache(name: str) -> None:
    case = zoo.llama(text=150)
    compiled = torch.compile(case.model, backend="attentionpack", options=MEMBERS[name][0])
    cache, dense = prefilled(compiled, case.inputs), transformers.DynamicCache()
    case.model(**case.inputs, past_key_values=dense)
    mask = dense_mask = case.inputs["attention_mask"]
    start = cache.layers[0].keys.store.coded
    for i in range(80):
        got, mask = step(compiled, cache, mask, 10 + i)
        expected, dense_mask = step(case.model, dense, dense_mask, 10 + i)
    store = cache.layers[0].keys.store
    assert store.coded >= start + 64
    for packed, plain in zip(cache.layers, dense.layers, strict=True):
        far = packed.keys.unpack()[:, :, 8 : store.coded]
        assert isinstance(packed.keys, PackedKV)
        exact = plain.keys[:, :, 8 : store.coded]
        late = slice(start, store.coded - 8)  # coded by flushes
        error = (far - exact)[:, :, late].square().sum() / exact[:, :, late].square().sum()
        assert error < 0.75  # random weights have no low rank to be found
    relative = (got - expected).norm() / expected.norm()
    assert relative < {"int8": 0.01, "int4": 0.1}.get(name, 0.75)


@torch.no_grad()
def test_papers_mode_factors_again_and_counts_its_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apack_compile.cache.store.REFACTOR", 64)
    case = padded_case()
    compiled = torch.compile(case.model, backend="attentionpack", options=MEMBERS["paper"][0])
    cache = transformers.DynamicCache()
    compiled(**case.inputs, past_key_values=cache)
    store = cache.layers[0].keys.store
    first = store.ref
    basis = first.code.params[0]
    assert (basis.shape, basis.dtype) == ((2, 32, 8), torch.float16)
    counted = cache_bytes(cache)
    assert counted.bases == 0 and counted.packed == sum(
        t.store.nbytes for layer in cache.layers for t in (layer.keys, layer.values)
    )
    assert store.nbytes >= basis.nbytes + store.side.payload[0].nbytes
    mask = case.inputs["attention_mask"]
    for _ in range(100):
        _, mask = step(compiled, cache, mask)
    store = cache.layers[0].keys.store
    assert store.ref is not first and store.factored > 87
    assert apack_compile.report(case.model).recompiles == 0


@torch.no_grad()
def test_bases_of_sequences_follow_their_rows() -> None:
    case = padded_case()
    compiled = torch.compile(case.model, backend="attentionpack", options=MEMBERS["paper"][0])
    cache = transformers.DynamicCache()
    compiled(**case.inputs, past_key_values=cache)
    dense = unpacked(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    dense.reorder_cache(torch.tensor([1, 0]))
    for packed, plain in zip(cache.layers, dense.layers, strict=True):
        assert isinstance(packed.keys, PackedKV)
        torch.testing.assert_close(packed.keys.unpack(), plain.keys)
        torch.testing.assert_close(packed.values.unpack(), plain.values)
