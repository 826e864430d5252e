"""Every way in that a user may take reaches packed attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx as inductor
import transformers

import apack_compile
from apack_compile import PackedKV

from .. import zoo

STEPS = 6
OPTIONS = {"codec": "exact", "inner": "eager"}


def generate(model: Any, case: zoo.Case, **more: Any) -> torch.Tensor:
    return model.generate(**case.inputs, max_new_tokens=STEPS, do_sample=False, **more)


def optimized_module(case: zoo.Case) -> torch.Tensor:
    return generate(torch.compile(case.model, backend="attentionpack", options=OPTIONS), case)


def module_compile(case: zoo.Case) -> torch.Tensor:
    case.model.compile(backend="attentionpack", options=OPTIONS)
    return generate(case.model, case)


def compiled_forward(case: zoo.Case) -> torch.Tensor:
    case.model.forward = torch.compile(case.model.forward, backend="attentionpack", options=OPTIONS)
    return generate(case.model, case)


def by_hand(case: zoo.Case) -> torch.Tensor:
    compiled = torch.compile(case.model, backend="attentionpack", options=OPTIONS)
    ids, cache = case.inputs["input_ids"], transformers.DynamicCache()
    out = compiled(input_ids=ids, past_key_values=cache)
    tokens = [ids, out.logits[:, -1:].argmax(-1)]
    for _ in range(STEPS - 1):
        out = compiled(input_ids=tokens[-1], past_key_values=cache)
        tokens.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(tokens, 1)


WAYS: list[Callable[[zoo.Case], torch.Tensor]] = [
    optimized_module, module_compile, compiled_forward, by_hand,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_way_in_attends_to_packed_caches(way: Callable[[zoo.Case], torch.Tensor]) -> None:
    expected = generate(zoo.llama().model, zoo.llama())
    case = zoo.llama()
    assert torch.equal(way(case), expected)
    assert apack_compile.report(case.model).attends == 2 * (STEPS - 1)


def test_compile_config_attends_to_packed_caches() -> None:
    """generate() itself compiles decode only: the dense prefill is packed by the first step."""
    expected = generate(zoo.llama().model, zoo.llama())
    case = zoo.llama()
    config = transformers.CompileConfig(backend="attentionpack", mode=None, options=OPTIONS)
    assert torch.equal(generate(case.model, case, compile_config=config), expected)
    assert apack_compile.report(case.model).attends == 2 * (STEPS - 2)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_mode_is_inductors_mode(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = zoo.llama(num_hidden_layers=1)
    configs: list[dict[str, Any]] = []
    compile_fx = inductor.compile_fx

    def spy(gm: Any, inputs: Any, **more: Any) -> Any:
        if "config_patches" in more:  # it calls itself, without
            configs.append(more["config_patches"])
        return compile_fx(gm, inputs, **more)

    monkeypatch.setattr(inductor, "compile_fx", spy)
    compiled = torch.compile(case.model, backend="attentionpack", mode=mode)
    generate(compiled, case)
    assert apack_compile.report(case.model).attends == STEPS - 1
    wanted = torch._inductor.list_mode_options(mode) if mode != "default" else {}
    assert configs
    for name in {*wanted} - {"triton.cudagraphs"}:  # of ours; see compat
        assert all(config[name] == wanted[name] for config in configs)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("family", [zoo.llama, zoo.llava], ids=lambda family: family.__name__)
def test_with_dynamic_shapes_from_the_start_caches_are_packed(
    family: Callable[[], zoo.Case], inner: str
) -> None:
    """Bugs: the scale of attention is a symbol then, and no site was packed; it is read out of a
    tensor, and no graph was compiled."""
    case = family()
    expected = generate(case.model, case)
    options = {**OPTIONS, "inner": inner}
    compiled = torch.compile(case.model, backend="attentionpack", dynamic=True, options=options)
    assert torch.equal(generate(compiled, case), expected)
    report = apack_compile.report(case.model)
    assert (report.attends, report.recompiles) == (2 * (STEPS - 1), 0)


@torch.no_grad()
def test_a_float_that_changes_is_not_taken_for_what_it_was() -> None:
    case = zoo.llama(num_hidden_layers=1)
    options = {**OPTIONS, "inner": "aot_eager"}
    compiled = torch.compile(case.model, backend="attentionpack", dynamic=True, options=options)
    for epsilon in (1e-6, 0.5, 1e-6):
        case.model.model.norm.variance_epsilon = epsilon
        wanted = case.model(**case.inputs).logits
        torch.testing.assert_close(compiled(**case.inputs).logits, wanted, rtol=1e-4, atol=1e-5)
    assert apack_compile.report(case.model).recompiles == 1


@torch.no_grad()
def test_a_float_that_changes_at_every_call_is_not_compiled_for_ever() -> None:
    case = zoo.llama(num_hidden_layers=1)
    options = {**OPTIONS, "inner": "aot_eager"}
    compiled = torch.compile(case.model, backend="attentionpack", dynamic=True, options=options)
    for number in range(10):
        case.model.model.norm.variance_epsilon = 0.1 * number + 0.01
        wanted = case.model(**case.inputs).logits
        torch.testing.assert_close(compiled(**case.inputs).logits, wanted, rtol=1e-4, atol=1e-5)
    report = apack_compile.report(case.model)
    assert report.graph_reports[0].compiles == 8
    assert "a float of the model has had 9 values" in report.graph_reports[0].reason


def test_generate_on_the_compiled_object_runs_no_forward_eagerly() -> None:
    """Bug of stock torch: OptimizedModule.generate runs the original model, 0 graphs."""
    case = zoo.llama()
    compiled = torch.compile(case.model, backend="attentionpack", options=OPTIONS)
    generate(compiled, case)
    report = apack_compile.report(case.model)
    assert sum(count for graph in report.graph_reports for _, count in graph.runs) == STEPS


def test_other_backends_keep_their_behaviour() -> None:
    case = zoo.llama()
    generate(torch.compile(case.model, backend="eager"), case)
    assert case.model._compiled_call_impl is None
    assert apack_compile.report().graphs == 0


def test_two_ratios_of_one_model_and_the_model_itself_stay_apart() -> None:
    """Bug: the last torch.compile won for every object made of the model, and for the model."""
    case = zoo.llama()
    short, long = (
        torch.compile(case.model, backend="attentionpack", options={**OPTIONS, "window": window})
        for window in (7, 9)
    )
    for compiled, window in ((short, 7), (long, 9), (short, 7)):
        cache = generate(compiled, case, return_dict_in_generate=True).past_key_values
        assert cache.layers[0].keys.store.policy.window == window
    plain = generate(case.model, case, return_dict_in_generate=True).past_key_values
    assert not isinstance(plain.layers[0].keys, PackedKV)


def test_two_models_that_share_nothing_are_both_packed() -> None:
    for layers in (1, 2, 3):
        case = zoo.llama(num_hidden_layers=layers)
        out = torch.compile(case.model, backend="attentionpack", options=OPTIONS)
        generate(out, case)
        assert apack_compile.report(case.model).attends == layers * (STEPS - 1)


def test_cache_of_a_generate_call_is_packed_and_can_be_counted() -> None:
    case = zoo.llama(text=400)
    compiled = torch.compile(
        case.model, backend="attentionpack", options={"ratio": 8, "inner": "eager"}
    )
    out = generate(compiled, case, return_dict_in_generate=True)
    count = apack_compile.cache_bytes(out.past_key_values)
    assert all(isinstance(layer.values, PackedKV) for layer in out.past_key_values.layers)
    assert count.dense == 2 * 2 * 2 * 16 * (401 + STEPS - 1) * 4
    assert count.packed < count.dense / 2
    assert count.unpacked == 0


def test_compiling_leaves_the_numbers_of_the_original_model_alone() -> None:
    """Bug: output-capturing hooks installed twice gave LLaVA the features of another layer."""
    case = zoo.llava(text=10)
    expected = case.model(**case.inputs).logits
    torch.compile(case.model, backend="attentionpack", options=OPTIONS)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(case.model(**case.inputs).logits, expected)
