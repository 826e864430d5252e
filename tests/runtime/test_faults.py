"""Whatever breaks in our own work, the model runs, right, and one warning says so."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import apack_compile
from apack_compile import backend
from apack_compile.cache import SideStore
from apack_compile.runtime import graph, study

from .. import zoo

EXACT = {"codec": "exact", "inner": "eager"}


def generate(model: Any, case: zoo.Case) -> torch.Tensor:
    return model.generate(**case.inputs, max_new_tokens=6, do_sample=False)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [r for r in caplog.records if r.levelno >= logging.WARNING]
    return [r.getMessage() for r in records if r.name.startswith("apack_compile")]


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("injected\nby this test")


def test_a_pass_that_fails_leaves_the_graph_to_stock_inductor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = zoo.llama()
    expected = generate(case.model, case)
    monkeypatch.setattr(backend, "make_plan", broken)
    compiled = torch.compile(case.model, backend="attentionpack", options=EXACT)
    assert torch.equal(generate(compiled, case), expected)
    report = apack_compile.report(case.model)
    assert report.packed_graphs == 0
    assert "a pass failed (injected)" in str(report)
    assert len(warnings(caplog)) == report.graphs, "one for each graph"


@pytest.mark.parametrize("what", ["rewrite_attend", "rewrite_encode", "Specialised"])
def test_a_rewriting_or_compilation_that_fails_leaves_caches_dense(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = zoo.llama()
    expected = generate(case.model, case)
    monkeypatch.setattr(graph, what, broken)
    compiled = torch.compile(case.model, backend="attentionpack", options=EXACT)
    assert torch.equal(generate(compiled, case), expected)
    report = apack_compile.report(case.model)
    assert (report.packed_graphs, report.attends) == (0, 0)
    assert "could not be rewritten or compiled (injected)" in str(report)
    assert 1 <= len(warnings(caplog)) <= report.graphs


def test_a_first_prefill_that_cannot_be_learnt_from_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = zoo.llama(text=100)
    expected = generate(case.model, case)
    monkeypatch.setattr(study, "collect", broken)
    options = {"ratio": 4, "inner": "eager"}
    compiled = torch.compile(case.model, backend="attentionpack", options=options)
    assert torch.equal(generate(compiled, case), expected)
    assert "(injected)" in str(apack_compile.report(case.model))
    assert warnings(caplog)


def test_a_decode_step_that_cannot_be_compiled_goes_on_with_a_packed_past(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = zoo.llama()
    expected = generate(case.model, case)
    real = graph.rewrite_attend

    def fails_on_packed(draft: Any) -> Any:
        return broken() if draft.plan.handles else real(draft)

    monkeypatch.setattr(graph, "rewrite_attend", fails_on_packed)
    compiled = torch.compile(case.model, backend="attentionpack", options=EXACT)
    assert torch.equal(generate(compiled, case), expected)
    runs = [dict(g.runs) for g in apack_compile.report(case.model).graph_reports]
    assert {"encode": 1} in runs and any("uncompiled" in r for r in runs)


def test_memory_that_runs_out_while_packing_leaves_that_cache_dense(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = zoo.llama(text=200)
    expected = generate(case.model, case)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("injected")

    options = {"ratio": 2, "inner": "eager", "fit_tokens": 64, "profile_cache": False}
    compiled = torch.compile(case.model, backend="attentionpack", options=options)
    with monkeypatch.context() as patch:
        patch.setattr(SideStore, "encode", full)
        out = compiled(**case.inputs, use_cache=True)
    assert torch.equal(out.logits[:, -1].argmax(-1), expected[:, case.inputs["input_ids"].shape[1]])
    assert all(type(layer.keys) is torch.Tensor for layer in out.past_key_values.layers)
    assert "memory ran out while a cache was packed: left dense" in warnings(caplog)[0]
