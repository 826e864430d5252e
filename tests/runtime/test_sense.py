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
from apack_compile.runtime.replay import Split, Unmeasured

from .. import zoo
from ..passes.capture import capture

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
def test_what_is_recalled_are_pieces_of_what_a_code_will_hold(
    length: int, pieces: int, padding: int
) -> None:
    coded = torch.ones(2, length, dtype=torch.bool)
    coded[:, :4] = False
    coded[1, : padding + 4] = False
    split = Split.of(coded, window=40)
    sources = split.pieces()
    assert len(sources) == split.tail
    assert bool(split.coded[:, sources].all())
    assert int((sources.diff() != 1).sum()) == pieces - 1
    assert len(sources.unique()) == split.tail


def test_recall_is_the_sensitivity_of_a_prompt_that_repeats_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bug: pass keys were lost at ratio 8; nothing in prose asks for what a context said."""
    monkeypatch.setattr(sense, "RECALL_DRAWS", sense.DRAWS)
    torch.manual_seed(2)
    ids = torch.randint(10, 190, (1, 300))
    model, positions = zoo.plain_decoder(), torch.arange(300)[None]
    coded = torch.ones(1, 300, dtype=torch.bool)
    coded[:, :4] = False
    split = Split.of(coded, window=16)
    repeated = ids.clone()
    repeated[:, -split.tail :] = ids[:, split.pieces()]

    def measured(ids: torch.Tensor, recall: bool) -> list[Sensitivity]:
        seen = capture(model, ids, positions)
        sites = seen.plan.having("encode")
        turns = [None] * len(sites)
        return sense.measure(seen.gm, seen.args, sites, turns, coded, 16, recall)

    want, got, other = measured(repeated, False), measured(ids, True), measured(ids, False)
    for a, b, c in zip(want, got, other, strict=True):
        torch.testing.assert_close(a.k, b.k)
        torch.testing.assert_close(a.v, b.v)
        assert not torch.allclose(c.k, b.k, rtol=0.1)


def test_recall_counts_by_its_share() -> None:
    def layers(*sizes: float) -> list[Sensitivity]:
        eye = torch.eye(4, dtype=torch.float64).expand(2, 4, 4) / 8
        return [Sensitivity(eye * 0.75 * size, eye * 0.25 * size) for size in sizes]

    both = sense.Measured(layers(1.0, 3.0), layers(10.0, 30.0)).mixed
    factor = 1 + sense.RECALL
    assert [layer.trace for layer in both] == pytest.approx([factor * 1.0, factor * 3.0])
    alone = sense.Measured(layers(1.0), layers(0.0)).mixed
    assert alone[0].trace == pytest.approx(1.0)


def test_what_trials_say_of_prose_leaves_recall_as_it_is() -> None:
    eye = torch.eye(4, dtype=torch.float64)[None] / 4
    measured = sense.Measured([Sensitivity(eye, eye)], [Sensitivity(2 * eye, 6 * eye)])
    share = sense.RECALL * 2 / 8
    (layer,) = measured.corrected([(3.0, 0.5)])
    torch.testing.assert_close(layer.k, (3.0 + 2 * share) * eye)
    torch.testing.assert_close(layer.v, (0.5 + 6 * share) * eye)


def test_where_recall_cannot_be_measured_the_prompts_own_tokens_count_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measure, found = studies.measure, []

    def fails(*args: Any) -> list[Sensitivity]:
        if args[-1]:
            raise Unmeasured("out of memory")
        found.append(measure(*args))
        return found[-1]

    monkeypatch.setattr(studies, "measure", fails)
    case = zoo.llama(text=500)
    with caplog.at_level("INFO"):
        prefill(torch.compile(case.model, backend="attentionpack", options=OPTIONS), case, 500)
    assert len(found) == 1
    assert "recall is not measured: out of memory" in caplog.text
    (graph,) = apack_compile.report(case.model).graph_reports
    assert graph.notes == ()
