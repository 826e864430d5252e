"""Learning from a first prefill: sensitivity, and codes for the contexts to come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import apack_compile
from apack_compile.codec.sensitivity import Sensitivity
from apack_compile.fitting import learn
from apack_compile.runtime import sense
from apack_compile.runtime import study as studies
from apack_compile.runtime.replay import Split

from .. import zoo

OPTIONS = {"ratio": 8, "inner": "eager"}


def prefill(compiled: Any, case: zoo.Case, tokens: int) -> transformers.DynamicCache:
    cache = transformers.DynamicCache()
    ids = case.inputs["input_ids"][:, :tokens]
    compiled(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return cache


def test_the_first_prefill_measures_sensitivity_and_leaves_the_users_randomness() -> None:
    case = zoo.llama(text=500)
    compiled = torch.compile(case.model, backend="attentionpack", options=OPTIONS)
    before = torch.random.get_rng_state()
    prefill(compiled, case, 500)
    assert torch.equal(torch.random.get_rng_state(), before)
    (graph,) = apack_compile.report(case.model).graph_reports
    assert graph.notes == () and dict(graph.runs) == {"fit": 1}
    assert all(p.grad is None for p in case.model.parameters())


def test_inference_mode_measures_as_well() -> None:
    case = zoo.llama(text=500)
    compiled = torch.compile(case.model, backend="attentionpack", options=OPTIONS)
    with torch.inference_mode():
        prefill(compiled, case, 500)
    (graph,) = apack_compile.report(case.model).graph_reports
    assert graph.notes == ()


def test_too_little_memory_is_said_and_every_layer_gets_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sense, "_free_bytes", lambda device: 1000)
    case = zoo.llama(text=500)
    compiled = torch.compile(case.model, backend="attentionpack", options=OPTIONS)
    cache = prefill(compiled, case, 500)
    (graph,) = apack_compile.report(case.model).graph_reports
    reasons = {reason for _, reason in graph.notes}
    assert reasons == {
        "sensitivity not measured (too little memory for gradients of so long a prompt): "
        "the same bits in every layer"
    }
    assert len({layer.keys.store.ref.layout for layer in cache.layers}) == 1


def test_a_prompt_beyond_the_reach_is_fitted_anew_with_the_same_layouts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bug: codes fitted on a short prompt were used at any length."""
    monkeypatch.setattr(learn, "LEAST_REACH", 300)
    case = zoo.llama(text=1400)
    compiled = torch.compile(case.model, backend="attentionpack", options=OPTIONS)
    first = prefill(compiled, case, 300)  # reaches to 600
    prefill(compiled, case, 590)
    runs: dict[str, int] = {}
    later = prefill(compiled, case, 1300)
    for graph in apack_compile.report(case.model).graph_reports:
        for what, count in graph.runs:
            runs[what] = runs.get(what, 0) + count
    assert runs == {"fit": 2, "encode": 1}
    for a, b in zip(first.layers, later.layers, strict=True):
        assert a.keys.store.ref is not b.keys.store.ref
        assert a.keys.store.ref.layout == b.keys.store.ref.layout


@pytest.mark.parametrize(("length", "pieces"), [(1400, 2), (300, 1), (140, 1)])
@pytest.mark.parametrize("padding", [0, 17])
def test_recalled_tokens_are_pieces_of_what_a_code_will_hold(
    length: int, pieces: int, padding: int
) -> None:
    coded = torch.ones(2, length, dtype=torch.bool)
    coded[:, :4] = False
    coded[1, : padding + 4] = False
    split = Split.of(coded, window=40)
    sources = sense.Recall.of(split).sources
    assert len(sources) == split.tail
    assert bool(split.coded[:, sources].all())
    assert int((sources.diff() != 1).sum()) == pieces - 1
    assert len(sources.unique()) == split.tail


def test_the_last_embeddings_are_those_recalled_and_all_others_stay() -> None:
    stream = torch.randn(2, 400, 8)
    coded = torch.ones(2, 400, dtype=torch.bool)
    recall = sense.Recall.of(Split.of(coded, window=40))
    changed, tail = recall.apply(stream), len(recall.sources)
    assert torch.equal(changed[:, :-tail], stream[:, :-tail])
    assert torch.equal(changed[:, -tail:], stream[:, recall.sources])


def test_recall_adds_its_share_to_the_sensitivity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: pass keys were lost at ratio 8; nothing in prose asks for what a context said."""
    seen: list[list[Sensitivity]] = []
    gradients, measure = sense._Work.gradients, studies.measure
    monkeypatch.setattr(sense._Work, "gradients", lambda *a: seen.append(gradients(*a)) or seen[-1])
    monkeypatch.setattr(studies, "measure", lambda *a: seen.append(measure(*a)) or seen[-1])
    case = zoo.llama(text=500)
    prefill(torch.compile(case.model, backend="attentionpack", options=OPTIONS), case, 500)
    prose, recall, both = ([layer.trace for layer in layers] for layers in seen)
    share = sense.RECALL * sum(prose) / sum(recall)
    assert both == pytest.approx([a + share * b for a, b in zip(prose, recall, strict=True)])
    assert prose != pytest.approx(recall, rel=1e-3)
