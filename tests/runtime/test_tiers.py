"""Values with as many bits as the attention of their token is worth, through the backend."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import apack_compile
from apack_compile import PackedKV
from apack_compile.accounting import cache_bytes
from apack_compile.codec import TieredLayout
from apack_compile.codec.tiered import TIERS

from .. import plain, zoo

FITTED = {"ratio": 4, "fit_tokens": 64, "window": 8, "block": 32, "tiers": True}


def prefilled(model: Any, inputs: dict[str, Tensor]) -> Any:
    cache = transformers.DynamicCache()
    model(**inputs, past_key_values=cache)
    return cache


def levels_of(cache: Any) -> Tensor:
    (layer,) = cache.layers
    return levels_in(layer.values)


def levels_in(values: Any) -> Tensor:
    """Of the coded tokens ``[B, S]``."""
    assert isinstance(values, PackedKV) and values.store is not None
    store = values.store
    assert isinstance(store.ref.layout, TieredLayout)
    return store.side.payload[2][:, : store.coded, 0]


@torch.no_grad()
def test_inductor_gives_what_eager_operators_give() -> None:
    """Over two flushes of the ring; the second prompt is encoded in the compiled graph."""
    model = plain.PlainDecoder(layers=1).eval()
    inputs = zoo.prompt(0, 100, 2, padded=True)
    ids, valid = inputs["input_ids"], inputs["attention_mask"]

    logits, levels, start = [], [], None
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        options = {**FITTED, "inner": inner, "profile_cache": False}
        ours = torch.compile(model, backend="attentionpack", options=options)
        plain.prefill_padded(ours, ids, valid)
        past = plain.prefill_padded(ours, ids, valid)
        levels.append(levels_in(past[0][1]))
        start = start or past
        found, past = plain.decode_padded(ours, copy.deepcopy(start), valid, 70)
        logits.append(found)
        assert levels_in(past[0][1]).shape[1] > 100
    # Rounding may let two tokens of nearly the same importance change places.
    assert (levels[0] == levels[1]).float().mean() > 0.95
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-4)
    assert apack_compile.report(model).recompiles == 0


@torch.no_grad()
def test_tokens_are_tiered_by_the_attention_that_they_receive() -> None:
    case = zoo.llama(text=200, num_hidden_layers=1)
    options = {**FITTED, "inner": "eager", "profile_cache": False}
    ours = torch.compile(case.model, backend="attentionpack", options=options)
    found = []

    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        found.append(output[1])

    for _ in range(2):  # packed by the runtime behind the fit, then by the graph
        levels = levels_of(prefilled(ours, case.inputs))[0]
        for plane, share in enumerate(TIERS, 1):
            assert int((levels >= plane).sum()) == -(-share * len(levels) // 32)
        stock = zoo.llama(text=200, num_hidden_layers=1, attn_implementation="eager").model
        hook = stock.model.layers[0].self_attn.register_forward_hook(watch, with_kwargs=True)
        stock(**case.inputs)
        hook.remove()
        mass = found[-1][0, :, -64:].mean((0, 1))[: len(levels)]
        for level in range(4):
            higher, lower = mass[levels > level], mass[levels == level]
            assert higher.min() >= lower.max() - 1e-6
    cache = prefilled(ours, case.inputs)
    report = apack_compile.report(case.model)
    assert "values in tiers: 7% of the coded tokens have all bits" in str(report)
    del cache
    assert sum(report.tiers) == pytest.approx(1)
    assert report.tiers[0] == pytest.approx(2 / 32, abs=0.01)


@torch.no_grad()
def test_a_cache_in_tiers_takes_the_bytes_that_its_ratio_says() -> None:
    case = zoo.llama(text=1500, num_hidden_layers=1, hidden_size=256, head_dim=64)
    options = {**FITTED, "ratio": 8, "inner": "eager", "profile_cache": False}
    ours = torch.compile(case.model, backend="attentionpack", options=options)
    cache = prefilled(ours, case.inputs)
    (layer,) = cache.layers
    stores = layer.keys.store, layer.values.store
    coded = sum(s.ref.layout.token_bytes(torch.float16) for s in stores)
    heads, dim = layer.keys.shape[1], layer.keys.shape[3]
    assert 8 <= 2 * 2 * heads * dim / coded < 10
    payload = sum(t.nbytes for s in stores for t in s.side.payload)
    assert payload == pytest.approx(coded * layer.keys.shape[2], rel=0.06), "and little slack"
    counted = cache_bytes(cache)
    assert counted.codes + counted.gains == payload
