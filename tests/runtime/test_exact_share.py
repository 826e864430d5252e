"""Tokens that the code holds worst stay exact, a share of them, through the backend."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import apack_compile
from apack_compile import PackedKV
from apack_compile.codec.layout import KEPT_OF, SPARE

from .. import plain, zoo

SHARE = 0.04
KEPT = round(SHARE * KEPT_OF)
FITTED = {
    "ratio": 4, "fit_tokens": 64, "window": 8, "block": 32, "exact_share": SHARE,
    "profile_cache": False,
}  # fmt: skip


def stores(cache: Any) -> list[Any]:
    sides = [side for layer in cache.layers for side in (layer.keys, layer.values)]
    assert all(isinstance(side, PackedKV) for side in sides)
    return [side.store for side in sides]


def prefilled(model: Any, inputs: dict[str, Tensor]) -> Any:
    cache = transformers.DynamicCache()
    model(**inputs, past_key_values=cache)
    return cache


def on_demand(store: Any) -> Tensor:
    """Positions ``[B, E]`` of slots taken on demand."""
    return store.side.pool_positions[:, store.policy.sinks :]


@torch.no_grad()
@pytest.mark.parametrize("k_code", ["post-rope", "pre-rope"])
def test_as_many_tokens_stay_exact_as_the_share_says(k_code: str) -> None:
    case = zoo.llama(text=400, num_hidden_layers=1)
    options = {**FITTED, "k_code": k_code, "inner": "eager"}
    ours = torch.compile(case.model, backend="attentionpack", options=options)
    dense = prefilled(zoo.llama(text=400, num_hidden_layers=1).model, case.inputs)
    for _ in range(2):  # packed by the runtime behind the fit, then by the graph
        cache = prefilled(ours, case.inputs)
        for store, exact in zip(
            stores(cache), (dense.layers[0].keys, dense.layers[0].values), strict=True
        ):
            wanted = KEPT * store.coded // KEPT_OF
            assert wanted == 15
            taken = on_demand(store)
            assert taken.shape[1] == wanted + SPARE and (taken >= 0).sum() == wanted
            where = taken[taken >= 0]
            read = store.dense(store.length)[0, :, where]
            torch.testing.assert_close(read, exact[0, :, where], rtol=1e-5, atol=1e-5)
    report = str(apack_compile.report(case.model))
    assert "tokens a sequence and side kept exact as well" in report


@torch.no_grad()
def test_bytes_are_those_of_the_ratio() -> None:
    case = zoo.llama(text=1500, num_hidden_layers=1, hidden_size=256, head_dim=64)
    found = []
    for share in (0.0, SHARE):
        options = {**FITTED, "ratio": 8, "exact_share": share, "inner": "eager"}
        torch._dynamo.reset()
        ours = torch.compile(case.model, backend="attentionpack", options=options)
        cache = prefilled(ours, case.inputs)
        found.append(sum(s.ref.layout.token_bytes(torch.float16) for s in stores(cache)))
    dense = 2 * 2 * stores(cache)[0].side.ring.shape[1] * 64
    assert found[0] <= dense / 8
    assert found[1] <= dense * (1 / 8 - KEPT / KEPT_OF)


@torch.no_grad()
def test_the_pool_grows_with_the_context_and_nothing_is_compiled_anew() -> None:
    """Over several flushes of the ring; batch entries have slots of their own."""
    model = plain.PlainDecoder(layers=1).eval()
    inputs = zoo.prompt(0, 100, 2, padded=True)
    ids, valid = inputs["input_ids"], inputs["attention_mask"]

    logits, start = [], None
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        ours = torch.compile(model, backend="attentionpack", options={**FITTED, "inner": inner})
        plain.prefill_padded(ours, ids, valid)
        past = plain.prefill_padded(ours, ids, valid)
        start = start or past
        before = start[0][0].store.side.pool.shape[2]
        found, past = plain.decode_padded(ours, copy.deepcopy(start), valid, 70)
        logits.append(found)
        store = past[0][0].store
        assert store.coded > 100
        assert (on_demand(store) >= 0).sum(1).tolist() == [KEPT * store.coded // KEPT_OF] * 2
        assert store.side.pool.shape[2] == 4 + SPARE + KEPT * store.side.capacity // KEPT_OF
        assert store.side.pool.shape[2] > before
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-4)
    assert apack_compile.report(model).recompiles == 0
