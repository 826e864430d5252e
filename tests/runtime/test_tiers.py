"""Values with as many bits as the attention of their token is worth, through the backend."""

from __future__ import annotations

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

from .. import zoo

FITTED = {"ratio": 4, "fit_tokens": 64, "window": 8, "block": 32, "tiers": True}


def decoded(model: Any, inputs: dict[str, Tensor], steps: int) -> tuple[Tensor, Any]:
    """Logits of a prefill and of fixed tokens behind it, one at a time."""
    cache, mask = transformers.DynamicCache(), inputs["attention_mask"]
    found = [model(**inputs, past_key_values=cache).logits[:, -1:]]
    for step in range(steps):
        ids = torch.full((mask.shape[0], 1), 20 + step)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        found.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(found, 1), cache


@torch.no_grad()
def test_inductor_gives_what_eager_operators_give() -> None:
    """Over two flushes of the ring; the second prompt is encoded in the compiled graph."""
    case = zoo.llama(batch=2, padded=True, text=100, num_hidden_layers=1)
    results = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        ours = torch.compile(
            case.model, backend="attentionpack",
            options={**FITTED, "inner": inner, "profile_cache": False},
        )  # fmt: skip
        decoded(ours, case.inputs, 0)
        results.append(decoded(ours, case.inputs, 70))
    (eager, cache), (compiled, other) = results
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)
    for layers in (cache.layers, other.layers):
        (layer,) = layers
        assert isinstance(layer.values, PackedKV) and layer.values.store is not None
        assert isinstance(layer.values.store.ref.layout, TieredLayout)
        assert layer.values.store.coded > 100
    report = apack_compile.report(case.model)
    assert report.recompiles == 0
    assert "values in tiers" in str(report)


@torch.no_grad()
def test_tokens_are_tiered_by_the_attention_that_they_receive() -> None:
    case = zoo.llama(text=200, num_hidden_layers=1)
    options = {**FITTED, "inner": "eager", "profile_cache": False}
    ours = torch.compile(case.model, backend="attentionpack", options=options)
    found = []

    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        found.append(output[1])

    for _ in range(2):  # packed by the runtime behind the fit, then by the graph
        _, cache = decoded(ours, case.inputs, 0)
        store = cache.layers[0].values.store
        levels = store.side.payload[2][0, : store.coded, 0]
        for plane, share in enumerate(TIERS, 1):
            assert int((levels >= plane).sum()) == share * store.coded // 32
        stock = zoo.llama(text=200, num_hidden_layers=1, attn_implementation="eager").model
        hook = stock.model.layers[0].self_attn.register_forward_hook(watch, with_kwargs=True)
        stock(**case.inputs)
        hook.remove()
        mass = found[-1][0, :, -64:].mean((0, 1))[: store.coded]
        for level in range(4):
            higher, lower = mass[levels > level], mass[levels == level]
            assert higher.min() >= lower.max() - 1e-6
    report = apack_compile.report(case.model)
    assert sum(report.tiers) == pytest.approx(1)
    assert report.tiers[0] == pytest.approx(2 / 32, abs=0.01)


@torch.no_grad()
def test_a_cache_in_tiers_takes_the_bytes_that_its_ratio_says() -> None:
    case = zoo.llama(text=1500, num_hidden_layers=1, hidden_size=256, head_dim=64)
    options = {**FITTED, "ratio": 8, "inner": "eager", "profile_cache": False}
    ours = torch.compile(case.model, backend="attentionpack", options=options)
    _, cache = decoded(ours, case.inputs, 0)
    (layer,) = cache.layers
    stores = layer.keys.store, layer.values.store
    coded = sum(s.ref.layout.token_bytes(torch.float16) for s in stores)
    heads, dim = layer.keys.shape[1], layer.keys.shape[3]
    assert 8 <= 2 * 2 * heads * dim / coded < 10
    payload = sum(t.nbytes for s in stores for t in s.side.payload)
    assert payload == pytest.approx(coded * layer.keys.shape[2], rel=0.06), "and little slack"
    counted = cache_bytes(cache)
    assert counted.codes + counted.gains == payload
