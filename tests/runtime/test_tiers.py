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
from apack_compile.kernels.planes import token_levels
from apack_compile.kernels.running_importance import KEEP

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


class ByHand:
    """What tokens receive in the ring of a model with one layer, from weights that a stock one has.

    Attributes:
        known: of all tokens ``[B, S]``; levels: of the coded ones, once they have left the ring.
    """

    WINDOW, RING = FITTED["window"], FITTED["window"] + FITTED["block"]

    def __init__(self, weights: Tensor, pads: Tensor) -> None:
        length = weights.shape[3]
        self.pads, self.start = pads, max(length - self.WINDOW, 0)
        real = torch.arange(length) >= pads[:, None]  # the stock model lets padding ask, too
        prompt = (weights * real[:, None, :, None])[:, :, -64:].mean((1, 2))
        self.known = self._shares(prompt)
        self.levels = self._levels(prompt[:, : self.start], 0)
        self.first = self.start

    def _shares(self, weights: Tensor) -> Tensor:
        """Of weights ``[B, S]`` those in the ring, over their sum."""
        here = torch.arange(weights.shape[1]) >= self.start
        return weights * here / (weights * here).sum(1, keepdim=True)

    def _levels(self, weights: Tensor, begin: int) -> Tensor:
        real = begin + torch.arange(weights.shape[1]) >= self.pads[:, None]
        return token_levels(weights.masked_fill(~real, -1), TIERS)

    def make_room(self) -> None:
        """Before a step of one token."""
        length = self.known.shape[1]
        if length - self.start + 1 > self.RING:
            end = length - self.WINDOW
            more = self._levels(self.known[:, self.start : end], self.start)
            self.levels, self.start = torch.cat([self.levels, more], 1), end

    def step(self, weights: Tensor) -> None:
        """A token whose query has ``weights [B, Hq, 1, S + 1]``."""
        inside = weights[:, :, 0] * (torch.arange(weights.shape[3]) >= self.start)
        mass = (inside / inside.sum(-1, keepdim=True)).mean(1)
        self.known = torch.cat([KEEP * self.known + (1 - KEEP) * mass[:, :-1], mass[:, -1:]], 1)


def stock_with_weights(**changes: Any) -> tuple[Any, list[Tensor]]:
    """The stock model, and a list to which it adds its attention weights."""
    stock = zoo.llama(num_hidden_layers=1, attn_implementation="eager", **changes).model
    found: list[Tensor] = []
    stock.model.layers[0].self_attn.register_forward_hook(
        lambda module, args, output: found.append(output[1])
    )
    return stock, found


def importance_in(cache: Any) -> Tensor:
    """Of the tokens in the ring ``[B, recent]``."""
    store = cache.layers[0].values.store
    assert cache.layers[0].keys.store.importance is None
    return store.importance[:, : store.recent]


@pytest.mark.parametrize(("text", "padded"), [(90, False), (90, True), (11, True)])
@torch.no_grad()
def test_later_tokens_are_tiered_by_what_they_receive_in_the_ring(text: int, padded: bool) -> None:
    """Over two flushes; of the shortest prompt, padding itself is in the ring."""
    case = zoo.llama(text=90, num_hidden_layers=1)
    options = {**FITTED, "inner": "eager", "profile_cache": False}
    ours = torch.compile(case.model, backend="attentionpack", options=options)
    prefilled(ours, case.inputs)
    stock, found = stock_with_weights()
    inputs = zoo.prompt(0, text, 2, padded)
    valid = inputs["attention_mask"]
    cache, dense = prefilled(ours, inputs), prefilled(stock, inputs)
    by_hand = ByHand(found.pop(), (1 - valid).sum(1))
    for step in range(70):
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], 1)
        more = {
            "input_ids": torch.full((2, 1), 20 + step), "attention_mask": valid,
            "position_ids": valid.sum(1, keepdim=True) - 1,
        }  # fmt: skip
        ours(**more, past_key_values=cache)
        stock(**more, past_key_values=dense)
        by_hand.make_room()
        by_hand.step(found.pop())
        want = by_hand.known[:, by_hand.start :]
        torch.testing.assert_close(importance_in(cache), want, rtol=1e-4, atol=1e-6)
    assert by_hand.start >= by_hand.first + 64
    assert torch.equal(levels_of(cache), by_hand.levels)
    # Every block has its share of each level, and padding is of the lowest.
    block = by_hand.levels[1, by_hand.first :][:32]
    assert [int((block >= plane).sum()) for plane in range(1, 5)] == list(TIERS)
    assert not by_hand.levels[0, : 5 * padded].any()


@torch.no_grad()
def test_a_second_turn_is_tiered_by_what_its_last_tokens_attend_to() -> None:
    case = zoo.llama(text=90, num_hidden_layers=1)
    options = {**FITTED, "inner": "eager", "profile_cache": False}
    ours = torch.compile(case.model, backend="attentionpack", options=options)
    prefilled(ours, case.inputs)
    stock, found = stock_with_weights()
    cache, dense = prefilled(ours, case.inputs), prefilled(stock, case.inputs)
    coded = cache.layers[0].values.store.coded
    turn = torch.randint(10, 190, (1, 100))
    ours(input_ids=turn, past_key_values=cache)
    stock(input_ids=turn, past_key_values=dense)
    mass = found[-1][0, :, -64:].mean((0, 1))  # by exact keys: ours are coded
    levels = levels_of(cache)[:, coded:]
    want = token_levels(mass[coded : coded + levels.shape[1]][None], TIERS)
    assert levels.shape == (1, 100)
    assert (levels == want).float().mean() > 0.7
    assert (levels.float() - want.float()).abs().max() <= 1


@pytest.mark.parametrize("way", [
    {"num_beams": 3},
    {"prompt_lookup_num_tokens": 3, "eos_token_id": 255},  # transformers 4.57 asks for one
], ids=["beams", "prompt lookup"])  # fmt: skip
@torch.no_grad()
def test_what_generate_does_to_a_cache_keeps_the_importance(way: dict[str, int]) -> None:
    case = zoo.llama(text=90)
    options = {**FITTED, "inner": "eager", "profile_cache": False}
    ours = torch.compile(case.model, backend="attentionpack", options=options)
    prefilled(ours, case.inputs)
    out = ours.generate(
        **case.inputs, **way, max_new_tokens=70, do_sample=False, return_dict_in_generate=True
    )
    for layer in out.past_key_values.layers:
        store = layer.values.store
        known = store.importance[:, : store.recent]
        assert store.coded >= 83 + 60 and known.shape[0] == way.get("num_beams", 1)
        assert (known >= 0).all() and known.isfinite().all()
        assert (known.sum(1) > 0.5).all() and (known.sum(1) < 1.5).all()
    assert apack_compile.report(case.model).recompiles == 0


@torch.no_grad()
def test_without_tiers_nothing_is_tracked() -> None:
    case = zoo.llama(text=90, num_hidden_layers=1)
    options = {**FITTED, "tiers": False, "inner": "eager", "profile_cache": False}
    ours = torch.compile(case.model, backend="attentionpack", options=options)
    for _ in range(2):
        cache = prefilled(ours, case.inputs)
        (layer,) = cache.layers
        for store in (layer.keys.store, layer.values.store):
            assert store.importance is None and len(store.owned()) == len(store.tensors())


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
