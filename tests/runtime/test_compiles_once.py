"""Compilations are bounded, and a graph that was compiled is a graph that runs."""

from __future__ import annotations

from typing import Any

import torch

import apack_compile

from .. import zoo

AOT = {"inner": "aot_eager"}


def runs(model: Any, what: str) -> int:
    graphs = apack_compile.report(model).graph_reports
    return sum(count for graph in graphs for name, count in graph.runs if name == what)


def test_one_prefill_and_one_decode_graph_and_no_recompile_over_300_steps() -> None:
    case = zoo.llama()
    compiled = torch.compile(
        case.model, backend="attentionpack", options={"ratio": 8, "fit_tokens": 64, **AOT}
    )
    compiled.generate(**case.inputs, max_new_tokens=301, do_sample=False)
    report = apack_compile.report(case.model)
    assert report.graphs == 2
    assert report.recompiles == 0
    assert runs(case.model, "fit") == 1
    assert runs(case.model, "decode") == 300
    assert report.attends == 2 * 300


def test_capacity_grows_without_a_recompile_even_where_it_equals_the_prompt() -> None:
    """Bug avoided: a capacity that equals the prompt's length must not share its symbol."""
    case = zoo.llama(text=127)  # 128 tokens, and chunks of 64
    compiled = torch.compile(case.model, backend="attentionpack", options={"codec": "exact", **AOT})
    compiled.generate(**case.inputs, max_new_tokens=200, do_sample=False)
    report = apack_compile.report(case.model)
    assert (report.graphs, report.recompiles) == (2, 0)
    assert runs(case.model, "decode") == 199


def test_other_lengths_and_batches_recompile_a_bounded_number_of_times() -> None:
    case = zoo.llama()
    compiled = torch.compile(
        case.model, backend="attentionpack", options={"ratio": 4, "fit_tokens": 64, **AOT}
    )
    graphs = []
    shapes = [(1, 90), (1, 120), (1, 77), (2, 90), (2, 131), (3, 84), (4, 99), (5, 140)]
    for calls, (batch, text) in enumerate(shapes, start=1):
        inputs = zoo.prompt(0, text, batch, padded=batch > 1)
        compiled.generate(**inputs, max_new_tokens=8, do_sample=False)
        graphs.append(apack_compile.report(case.model).graphs)
        assert runs(case.model, "decode") == 7 * calls, "decode fell back to eager"
        assert runs(case.model, "fit") + runs(case.model, "encode") == calls
    assert graphs[-1] <= 8
    assert graphs[-1] == graphs[-3], "still compiling after batch and length are symbols"
    assert apack_compile.report(case.model).recompiles <= 2


def test_fit_happens_once_and_later_prefills_encode_in_the_graph() -> None:
    case = zoo.llama(text=200)
    compiled = torch.compile(case.model, backend="attentionpack", options={"ratio": 8, **AOT})
    for _ in range(3):
        compiled.generate(**case.inputs, max_new_tokens=3, do_sample=False)
    assert runs(case.model, "fit") == 1
    assert runs(case.model, "encode") == 2


def test_short_prompts_are_kept_exact_until_enough_tokens_have_been_seen() -> None:
    case = zoo.llama(text=59)
    options = {"ratio": 8, "fit_tokens": 150, **AOT}
    compiled = torch.compile(case.model, backend="attentionpack", options=options)
    layouts = []
    for _ in range(4):
        out = compiled.generate(
            **case.inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True
        )
        layouts.append(out.past_key_values.layers[0].keys.store.ref.layout.kind)
    assert layouts == ["exact", "exact", "transform", "transform"]
    assert "packed exactly" not in str(apack_compile.report(case.model))


def test_recompile_limit_is_raised_and_restored_by_reset() -> None:
    import torch._dynamo.config as config

    torch._dynamo.reset()
    before = config.recompile_limit
    case = zoo.llama(num_hidden_layers=1)
    compiled = torch.compile(case.model, backend="attentionpack", options={"codec": "exact", **AOT})
    compiled.generate(**case.inputs, max_new_tokens=2, do_sample=False)
    assert config.recompile_limit == 64
    torch._dynamo.reset()
    assert config.recompile_limit == min(before, 8)
