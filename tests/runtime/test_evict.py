"""Tokens of a prompt dropped for good, through the backend."""

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

from .. import zoo
from ..helpers import dropped_tokens

WINDOW = 8
FITTED = {"ratio": 4, "fit_tokens": 64, "window": WINDOW, "block": 32, "profile_cache": False}


def compiled(case: Any, inner: str = "eager", **options: Any) -> Any:
    options = {**FITTED, "inner": inner, **options}
    return torch.compile(case.model, backend="attentionpack", options=options)


def prefilled(model: Any, inputs: dict[str, Tensor]) -> Any:
    cache = transformers.DynamicCache()
    model(**inputs, past_key_values=cache)
    return cache


def dropped(layer: Any) -> Tensor:
    """``[B, S]`` bool: the tokens of a layer that are gone."""
    keys, values = layer.keys, layer.values
    assert isinstance(keys, PackedKV) and isinstance(values, PackedKV)
    assert keys.store is not None and values.store is not None
    return dropped_tokens(keys.store) | dropped_tokens(values.store)


def packed_by_a_graph(case: Any, inner: str = "eager", **options: Any) -> tuple[Any, Any]:
    """The compiled model, whose codes the prompt itself has given, and the prompt's cache."""
    ours = compiled(case, inner, **options)
    prefilled(ours, case.inputs)
    return ours, prefilled(ours, case.inputs)


def hidden(case: Any, layers: list[Tensor], new: int) -> Tensor:
    """The mask of a stock model that sees what is left: ``[B, 1, new, S + new]``."""
    (gone,) = {tuple(map(tuple, each.tolist())) for each in layers}
    seen = ~torch.tensor(gone)
    batch, length = seen.shape
    mask = torch.ones(batch, 1, new, length + new, dtype=torch.bool)
    mask[:, :, :, length:] = torch.ones(new, new, dtype=torch.bool).tril()
    mask[:, 0, :, :length] = seen[:, None]
    return mask


@pytest.mark.parametrize("tiers", [False, True])
@pytest.mark.parametrize("k_code", ["post-rope", "pre-rope"])
@torch.no_grad()
def test_the_least_attended_tokens_of_a_prompt_are_dropped(k_code: str, tiers: bool) -> None:
    case = zoo.llama(text=200, num_hidden_layers=1)
    ours = compiled(case, evict=0.5, k_code=k_code, tiers=tiers)
    stock = zoo.llama(text=200, num_hidden_layers=1, attn_implementation="eager").model
    found: list[Tensor] = []
    stock.model.layers[0].self_attn.register_forward_hook(
        lambda module, args, output: found.append(output[1])
    )
    stock(**case.inputs)
    mass = found[0][0, :, -64:].mean((0, 1))
    for _ in range(2):  # packed by the runtime behind the fit, then by the graph
        cache = prefilled(ours, case.inputs)
        (gone,) = map(dropped, cache.layers)
        coded = case.inputs["input_ids"].shape[1] - WINDOW
        assert coded // 2 - 16 <= int(gone.sum()) <= coded // 2  # some have a slot of the pool
        assert not gone[:, :4].any() and not gone[:, coded:].any()
        assert float(mass[gone[0]].max()) <= float(mass[:coded].median()) + 1e-6
    report = apack_compile.report(case.model)
    assert report.dropped == pytest.approx(int(gone.sum()) / coded)
    assert f"evicted: {report.dropped:.0%} of the coded tokens" in str(report)


@pytest.mark.parametrize("new", [1, 5, 30])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@torch.no_grad()
def test_attention_does_not_see_them_and_positions_stay(new: int, inner: str) -> None:
    """Against the stock model with the same dense cache and a mask: also over 16 new tokens."""
    case = zoo.llama(text=200, num_hidden_layers=1)
    ours, cache = packed_by_a_graph(case, inner, evict=0.4)
    dense = transformers.DynamicCache()
    for number, layer in enumerate(cache.layers):
        dense.update(layer.keys.unpack(), layer.values.unpack(), number)
    mask = hidden(case, [dropped(layer) for layer in cache.layers], new)
    length = cache.get_seq_length()
    assert length == case.inputs["input_ids"].shape[1] and not mask.all()
    ids = torch.randint(0, 100, (1, new), generator=torch.Generator().manual_seed(3))
    places = torch.arange(length, length + new)[None]
    seen = case.model(ids, past_key_values=copy.deepcopy(dense), position_ids=places).logits
    want = case.model(ids, past_key_values=dense, attention_mask=mask, position_ids=places).logits
    got = ours(ids, past_key_values=cache).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (seen - want).abs().max() > 10 * (got - want).abs().max()
    assert all(isinstance(layer.keys, PackedKV) for layer in cache.layers)
    assert cache.get_seq_length() == length + new


@torch.no_grad()
def test_a_row_drops_what_it_drops_alone() -> None:
    """Left padding counts for nothing."""
    case = zoo.llama(text=120, num_hidden_layers=2)
    ours = compiled(case, evict=0.4)
    prefilled(ours, case.inputs)
    ids = case.inputs["input_ids"]
    padded = ids.repeat(2, 1)
    valid = torch.ones_like(padded)
    alone = prefilled(ours, {"input_ids": ids[:, 20:], "attention_mask": valid[:1, 20:]})
    valid[1, :20] = 0
    both = prefilled(ours, {"input_ids": padded, "attention_mask": valid})
    for one, two in zip(alone.layers, both.layers, strict=True):
        mine, theirs = dropped(one)[0], dropped(two)[1, 20:]
        assert (mine == theirs).float().mean() > 0.95  # rounding moves tokens of equal importance


@torch.no_grad()
def test_tokens_that_come_later_all_stay() -> None:
    case = zoo.llama(text=100, num_hidden_layers=1)
    ours, cache = packed_by_a_graph(case, evict=0.5)
    before = dropped(cache.layers[0])
    coded = before.shape[1] - WINDOW
    for _ in range(80):
        ours(torch.randint(0, 100, (1, 1)), past_key_values=cache)
    ours(torch.randint(0, 100, (1, 50)), past_key_values=cache)
    after = dropped(cache.layers[0])
    assert cache.layers[0].keys.store.coded > coded + 90
    assert torch.equal(after[:, :coded], before[:, :coded]) and not after[:, coded:].any()


@torch.no_grad()
def test_their_memory_is_free() -> None:
    case = zoo.llama(text=1500, num_hidden_layers=1, hidden_size=256, head_dim=64)
    sizes, ratios = [], []
    for evict in (0.0, 0.5):
        torch._dynamo.reset()
        _, cache = packed_by_a_graph(case, evict=evict, ratio=8)
        (layer,) = cache.layers
        stores = layer.keys.store, layer.values.store
        coded = sum(s.ref.layout.token_bytes(torch.float16) for s in stores)
        ratios.append(2 * 2 * layer.keys.shape[1] * layer.keys.shape[3] / coded)
        counted = cache_bytes(cache)
        sizes.append(counted.codes + counted.gains)
        assert sizes[-1] == pytest.approx(coded * layer.keys.shape[2], rel=0.06), "little slack"
    assert all(8 <= ratio < 10 for ratio in ratios), "others take the bytes of those dropped"
    assert sizes[1] <= 1.02 * sizes[0]


@torch.no_grad()
def test_generation_and_crop_with_dropped_tokens() -> None:
    """Greedy tokens are those of single steps on the same cache."""
    case = zoo.llama(text=120, num_hidden_layers=2)
    ours, cache = packed_by_a_graph(case, evict=0.4)
    length = cache.get_seq_length()
    first = ours(torch.tensor([[5]]), past_key_values=cache).logits
    cache.crop(length)
    assert torch.equal(ours(torch.tensor([[5]]), past_key_values=cache).logits, first)
    told = ours.generate(**case.inputs, max_new_tokens=6, do_sample=False)
    cache = transformers.DynamicCache()
    token = ours(**case.inputs, past_key_values=cache).logits[:, -1:].argmax(-1)
    single = [token]
    for _ in range(5):
        token = ours(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        single.append(token)
    assert torch.equal(told[:, length:], torch.cat(single, 1))
    assert dropped(cache.layers[1]).any()


@pytest.mark.parametrize("side", ["k_proj", "v_proj"])
@torch.no_grad()
def test_a_token_that_is_no_number_spoils_the_output_as_ever(side: str) -> None:
    """Bug: the value of a NaN key was dropped, and the key hidden with it."""
    case = zoo.llama(text=120, num_hidden_layers=1)
    ours = compiled(case, evict=0.4)
    prefilled(ours, case.inputs)
    projection = getattr(case.model.model.layers[0].self_attn, side)

    def spoil(module: Any, args: Any, output: Tensor) -> Tensor:
        output[:, 100:101, 3] = float("nan")
        return output

    hook = projection.register_forward_hook(spoil)
    torch._dynamo.reset()
    ours = compiled(case, evict=0.4)
    prefilled(ours, zoo.llama(text=100, num_hidden_layers=1).inputs)  # finite: it is fitted on
    cache = prefilled(ours, case.inputs)
    hook.remove()
    assert ours(torch.tensor([[5]]), past_key_values=cache).logits.isnan().any()


@torch.no_grad()
def test_padding_and_sinks_are_not_reported_as_dropped() -> None:
    case = zoo.llama(text=200, num_hidden_layers=1)
    ours = compiled(case, evict=0.25)
    prefilled(ours, case.inputs)
    ids = case.inputs["input_ids"].repeat(2, 1)
    valid = torch.ones_like(ids)
    valid[1, :150] = 0
    cache = prefilled(ours, {"input_ids": ids, "attention_mask": valid})
    assert apack_compile.report(case.model).dropped == pytest.approx(0.25, abs=0.03)
    assert dropped(cache.layers[0])[1, :150].all()


@torch.no_grad()
def test_a_short_prompt_keeps_more_than_its_sinks() -> None:
    case = zoo.llama(text=200, num_hidden_layers=1)
    ours = compiled(case, evict=0.9)
    prefilled(ours, case.inputs)
    ids = case.inputs["input_ids"][:, :30]
    cache = prefilled(ours, {"input_ids": ids})
    left = ~dropped(cache.layers[0])[0, 4 : 30 - WINDOW]
    assert left.any() and not left.all()
