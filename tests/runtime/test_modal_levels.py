"""Codes by kind together with tiers, evictions and shares of exact tokens, through the backend."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import apack_compile
from apack_compile import visual_tokens
from apack_compile.cache import SideStore
from apack_compile.codec import ModalLayout

from .. import zoo
from ..helpers import dropped_tokens
from .test_evict import hidden
from .test_modal import EVERY, compiled, images, kinds, marked, prefilled, runs, stores

SUBSETS: list[dict[str, Any]] = [
    {"tiers": True}, {"evict": 0.4}, {"exact_share": 0.03}, {**EVERY, "k_code": "pre-rope"},
]  # fmt: skip


def layout_of(store: SideStore) -> ModalLayout:
    assert isinstance(store.ref.layout, ModalLayout)
    return store.ref.layout


@pytest.mark.parametrize("more", SUBSETS, ids=str)
@torch.no_grad()
def test_decode_attends_to_what_the_cache_reads_as(more: dict[str, Any]) -> None:
    """Against the stock model with a mask of what is left; over flushes of the ring."""
    case = zoo.llama(text=250, num_hidden_layers=1)
    ours = compiled(case.model, **more)
    with visual_tokens(marked(1, case.inputs["input_ids"].shape[1], (20, 120))):
        prefilled(ours, case.inputs)
        cache = prefilled(ours, case.inputs)
    assert runs(case.model, "encode") == 1
    for count in (1, 5, 30, 1, 40, 1):  # 30 and 40: dense steps of packed layers
        dense = transformers.DynamicCache()
        for number, layer in enumerate(cache.layers):
            dense.update(layer.keys.unpack(), layer.values.unpack(), number)
        gone = torch.zeros(1, cache.get_seq_length(), dtype=torch.bool)
        for store in stores(cache):
            if store.ref.layout.evicts:
                gone |= dropped_tokens(store)
        mask = hidden(case, [gone], count)
        assert gone.any() == ("evict" in more)
        ids = torch.randint(10, 190, (1, count), generator=torch.Generator().manual_seed(count))
        places = torch.arange(count)[None] + cache.get_seq_length()
        want = case.model(
            ids, past_key_values=copy.deepcopy(dense), attention_mask=mask, position_ids=places
        ).logits
        got = ours(input_ids=ids, past_key_values=cache).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_only_visual_tokens_of_the_prompt_are_dropped() -> None:
    case = zoo.llava(side=112, batch=2, padded=True, text=200)
    ours = compiled(case.model, **EVERY)
    for what in ("fit", "encode"):  # packed by the runtime behind the fit, then by the graph
        cache = prefilled(ours, case.inputs)
        assert runs(case.model, what) == 1
        for store in stores(cache):
            layout, coded = layout_of(store), store.coded
            assert layout.evicts and layout.kept
            seen = images(case)[:, :coded]
            assert torch.equal(kinds(store), seen)
            absent = layout.absent(store.side.payload)
            assert absent is not None
            gone = absent[:, :coded]
            assert not (gone & ~seen).any(), "text stays"
            sinks = store.side.pool_positions[:, : store.policy.sinks]
            others = seen.scatter(1, sinks, False).sum(1)  # sinks are in the pool alone
            kept = -(-(32 - layout.evicts) * others // 32)
            assert torch.equal(gone.sum(1), seen.sum(1) - kept)
    report = apack_compile.report(case.model)
    assert report.tiers and 0 < report.dropped < 0.4
    assert report.predicted_bytes == report.packed_bytes
    text = str(report)
    for word in ("evicted: ", "by kind, ", "values in tiers: "):
        assert word in text
    for _ in range(60):
        ours(input_ids=torch.full((2, 1), 20), past_key_values=cache)
    for store in stores(cache):
        assert store.coded > coded
        assert not kinds(store)[:, coded:].any(), "what comes later is text"
        absent = layout_of(store).absent(store.side.payload)
        assert absent is not None and not absent[:, coded : store.coded].any()


@torch.no_grad()
def test_what_generate_does_to_a_cache() -> None:
    """Beams and a crop: what they leave reads as before."""
    case = zoo.llava(side=112, text=120)
    ours = compiled(case.model, **EVERY)
    prefilled(ours, case.inputs)
    told = ours.generate(**case.inputs, max_new_tokens=8, do_sample=False, num_beams=3)
    assert told.shape[1] == case.inputs["input_ids"].shape[1] + 8
    cache = prefilled(ours, case.inputs)
    before = tokens(cache)
    ours(input_ids=torch.full((1, 3), 20), past_key_values=cache)
    cache.crop(-3)
    again = tokens(prefilled(ours, case.inputs))
    for found, other, want in zip(tokens(cache), again, before, strict=True):
        assert torch.equal(found, want) and torch.equal(other, want)


def tokens(cache: Any) -> list[Tensor]:
    """What keys and values of all layers read as."""
    return [side.unpack() for layer in cache.layers for side in (layer.keys, layer.values)]


@torch.no_grad()
def test_one_compiled_prefill_serves_every_mixture() -> None:
    """How many rows the planes of a kind have is a symbol."""
    case = zoo.llama(batch=2, text=299)
    ours = compiled(case.model, **EVERY)
    compiles = []
    for counts in ((150, 150), (150, 150), (20, 250), (0, 100), (90, 7), (200, 200)):
        with visual_tokens(marked(2, 300, *((0, n) for n in counts))):
            cache = prefilled(ours, case.inputs)
        found = apack_compile.predict(case.model, batch=2, tokens=300, visual=counts)
        assert apack_compile.cache_bytes(cache) == found
        graphs = apack_compile.report(case.model).graph_reports
        compiles.append(sum(graph.compiles for graph in graphs))
    assert compiles[-1] == compiles[1] > 0, "no mixture is compiled for"
