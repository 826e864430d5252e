"""What is not packed runs as stock Inductor runs it, and the report says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import apack_compile
from apack_compile import OptionError, PackedKV, compat

from .. import zoo

EXACT = {"codec": "exact", "inner": "eager"}


def test_inputs_that_require_grad_run_stock_and_give_gradients() -> None:
    case = zoo.llama(text=20)
    ids = case.inputs["input_ids"]
    compiled = torch.compile(case.model, backend="attentionpack", options={"inner": "eager"})
    with torch.enable_grad():
        compiled(input_ids=ids, labels=ids).loss.backward()
        got = [p.grad.clone() for p in case.model.parameters()]
        case.model.zero_grad()
        with torch.compiler.set_stance("force_eager"):
            case.model(input_ids=ids, labels=ids).loss.backward()
    for mine, parameter in zip(got, case.model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)
    report = apack_compile.report(case.model)
    assert report.packed_graphs == 0
    assert "inputs require grad" in str(report)


def test_a_packed_cache_met_by_a_graph_that_requires_grad_is_used_dense() -> None:
    case = zoo.llama(text=100)
    compiled = torch.compile(case.model, backend="attentionpack", options=EXACT)
    packed, dense = transformers.DynamicCache(), transformers.DynamicCache()
    compiled(input_ids=case.inputs["input_ids"], past_key_values=packed)
    token = torch.tensor([[20]])
    with torch.compiler.set_stance("force_eager"):
        case.model(input_ids=case.inputs["input_ids"], past_key_values=dense)
        want = case.model(input_ids=token, past_key_values=dense).logits
    with torch.enable_grad():
        got = compiled(input_ids=token, past_key_values=packed).logits
    torch.testing.assert_close(got.detach(), want, rtol=1e-4, atol=1e-4)


def test_sliding_window_layers_are_left_dense_and_full_ones_packed() -> None:
    config = transformers.Gemma2Config(
        **zoo.text_config(head_dim=16, query_pre_attn_scalar=16, sliding_window=8)
    )
    model = zoo.make("Gemma2ForCausalLM", config)
    inputs = zoo.prompt(0, 30, 1, padded=False)
    settings: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    expected = model.generate(**inputs, **settings).sequences
    compiled = torch.compile(model, backend="attentionpack", options=EXACT)
    out = compiled.generate(**inputs, **settings)
    assert torch.equal(out.sequences, expected)
    kinds = {type(layer).__name__: type(layer.keys) for layer in out.past_key_values.layers}
    assert kinds == {"DynamicSlidingWindowLayer": torch.Tensor, "DynamicLayer": PackedKV}
    assert "sliding window" in str(apack_compile.report(model))


def test_vision_attention_is_left_alone() -> None:
    case = zoo.llava(text=20)
    compiled = torch.compile(case.model, backend="attentionpack", options=EXACT)
    compiled.generate(**case.inputs, max_new_tokens=3, do_sample=False)
    graphs = apack_compile.report(case.model).graph_reports
    assert max(len(g.packed) for g in graphs) == 2, "the text decoder has two layers"
    vision = [g for g in graphs if "no attention with a growing cache" in g.reason]
    assert vision, "the vision tower is a graph of its own"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ration": 8}, ["'ration'", "did you mean 'ratio'", "codec"]),
        ({"ratio": 1}, ["ratio=1", "2 to 32"]),
        ({"ratio": "8"}, ["ratio='8'", "a number"]),
        ({"codec": "zip"}, ["codec='zip'", "'exact'"]),
        ({"codec": "exact", "ratio": 8}, ["codec='exact'", "ratio=8"]),
        ({"window": 2.5}, ["window=2.5", "whole number"]),
        ({"inductor": {"nonsense": 1}}, ["'nonsense'", "list_options"]),
        ({"inductor": {"max_autotune": "no"}}, ["'max_autotune': 'no'", "bool"]),
        ("exact", ["options='exact'", "a dict"]),
    ],
)
def test_bad_options_are_named_with_what_is_accepted(
    options: dict[str, Any], words: list[str]
) -> None:
    case = zoo.llama(text=10)
    compiled = torch.compile(case.model, backend="attentionpack", options=options)
    with pytest.raises(Exception, match="option") as caught:
        compiled(input_ids=case.inputs["input_ids"])
    text = str(caught.value)
    assert "OptionError" in text or isinstance(caught.value, OptionError)
    for word in words:
        assert word in text


def test_an_unknown_mode_is_named_with_what_is_accepted() -> None:
    case = zoo.llama(text=10)
    compiled = torch.compile(case.model, backend="attentionpack", mode="fastest")
    with pytest.raises(Exception, match=r"mode='fastest'.*'reduce-overhead'"):
        compiled(input_ids=case.inputs["input_ids"])


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0+cpu"])
def test_an_unsupported_torch_is_refused_by_name(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=rf"2\.11.*2\.14.*{version[:4]}"):
        compat.check_torch()


def test_report_of_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"accepted is an nn\.Module"):
        apack_compile.report("llama")  # type: ignore[arg-type]
