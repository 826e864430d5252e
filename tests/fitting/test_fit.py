"""``apack_compile.fit``: codes from samples, ahead of the first prompt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import apack_compile
from apack_compile import FitError, FitSummary, OptionError
from apack_compile.fitting import session
from apack_compile.fitting.layer import PROFILES
from apack_compile.runtime.calibrate import Trial

from .. import plain, zoo

OPTIONS = {"ratio": 8, "inner": "eager"}


def tokens(count: int, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 190, (batch, count), generator=generator)


def first_prompt(model: Any, **inputs: Any) -> dict[str, int]:
    """What ran for the first prompt after a fit, Dynamo's memory of the fit gone."""
    compiled = torch.compile(model, backend="attentionpack", options=OPTIONS)
    compiled(**inputs)
    counts: dict[str, int] = {}
    for graph in apack_compile.report(model).graph_reports:
        counts |= dict(graph.runs)
    return counts


def test_after_a_fit_the_first_prompt_runs_compiled(_cache_folder: Path) -> None:
    case = zoo.llama()
    batches = [{"input_ids": tokens(400, 2)}, tokens(400, 2, seed=1)]
    summary = apack_compile.fit(case.model, batches, OPTIONS)
    assert (len(summary.layers), summary.batches) == (2, 2)
    assert summary.tokens == 4 * 396, "over all batches, sinks left out"
    assert summary.reasons == () and summary.seconds > 0
    (path,) = summary.paths
    assert path.is_relative_to(_cache_folder)
    assert all(0 < e < 1 for layer in summary.layers for e in layer.errors)
    assert all(t.measured > 0 for layer in summary.layers for t in layer.trials or ())
    assert summary.rank_correlation is not None
    assert first_prompt(case.model, input_ids=tokens(400, 2, seed=2)) == {"encode": 1}
    report = apack_compile.report(case.model)
    (graph,) = report.graph_reports
    assert graph.profile == f"fitted on 1584 tokens, saved to {path}" and graph.notes == ()
    assert [e for _, e in report.errors] == [e for layer in summary.layers for e in layer.errors]
    assert all(p.grad is None for p in case.model.parameters())


def test_a_model_of_ones_own_is_fitted_as_well() -> None:
    model = zoo.plain_decoder()
    inputs = {"ids": tokens(400), "positions": torch.arange(400)[None]}
    summary = apack_compile.fit(model, [inputs], OPTIONS)
    assert (len(summary.layers), summary.tokens) == (2, 396)
    assert first_prompt(model, **inputs) == {"encode": 1}


def test_images_are_fitted_across_graph_breaks() -> None:
    case = zoo.llava(text=400)
    summary = apack_compile.fit(case.model, [case.inputs], OPTIONS)
    assert (len(summary.layers), summary.tokens) == (2, 401)
    assert all(layer.trials is not None for layer in summary.layers)
    assert first_prompt(case.model, **case.inputs)["encode"] == 1


def moments_of(model: nn.Module, batches: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The moments, and the sensitivities, that codes are fitted from."""
    seen: list[Any] = []
    original = session.fit_layers

    def spy(group: Any, sensitivities: Any, options: Any) -> Any:
        for profile, sensitivity in zip(group, sensitivities, strict=True):
            seen.extend([*profile.moments.tensors()[:6], sensitivity.k, sensitivity.v])
        return original(group, sensitivities, options)

    with monkeypatch.context() as patch:
        patch.setattr(session, "fit_layers", spy)
        apack_compile.fit(model, batches, OPTIONS, measure=False)
    return seen


def test_two_batches_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.llama().model
    one, two = tokens(400), tokens(300, seed=1)
    first, second = (moments_of(model, [batch], monkeypatch) for batch in (one, two))
    both = moments_of(model, [one, two], monkeypatch)
    assert len(both) == 2 * 8
    for index, (a, b, c) in enumerate(zip(first, second, both, strict=True)):
        torch.testing.assert_close(c, a + b, rtol=1e-4, atol=1e-5 * float(c.abs().max()))
        assert index or float(c) == 396 + 296


def test_measured_sensitivity_rescales_predicted_one() -> None:
    assert session._ratio(Trial(2.0, 3.0)) == 1.5
    assert session._ratio(Trial(1.0, 39.0)) == 39.0
    assert session._ratio(Trial(1.0, 100.0)) == session.MOST
    assert session._ratio(Trial(1.0, -1e-9)) == session.LEAST
    assert session._ratio(Trial(0.0, 1.0)) == 1.0


def test_what_rounding_costs_is_not_taken_for_sensitivity() -> None:
    """Bug: in bfloat16 the least sensitive layers seemed to cost hundreds of times too much."""
    assert session._ratio(Trial(1e-6, 1.2e-3, 1.2e-3)) == 1.0  # nothing but rounding
    assert session._ratio(Trial(1e-6, 1.3e-3, 1.2e-3)) == 1.0  # its noise
    assert session._ratio(Trial(1e-6, 0.8e-3, 1.2e-3)) == 1.0
    assert session._ratio(Trial(2e-3, 3.3e-3, 1.3e-3)) == 1.0
    assert session._ratio(Trial(1e-3, 3.2e-3, 1.2e-3)) == pytest.approx(2.0)
    assert session._ratio(Trial(1e-5, 1.7e-3, 1.2e-3)) == pytest.approx(50.0)


def test_without_measuring_no_trial_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.Group, "calibrate", None)
    summary = apack_compile.fit(zoo.llama().model, [tokens(400)], OPTIONS, measure=False)
    assert [layer.trials for layer in summary.layers] == [None, None]
    assert summary.rank_correlation is None


def test_a_prompt_too_short_to_be_measured_is_said() -> None:
    batches = [tokens(100, 4, seed=i) for i in range(2)]
    summary = apack_compile.fit(zoo.llama().model, batches, OPTIONS)
    short = "a prompt of 100 tokens is too short"
    assert summary.reasons == (
        f"the sensitivity is predicted, not measured: {short}",
        f"sensitivity not measured ({short}): the same bits in every layer",
    )
    assert summary.rank_correlation is None


def test_a_fit_replaces_codes_that_a_prompt_has_left() -> None:
    model = zoo.llama().model
    assert first_prompt(model, input_ids=tokens(400)) == {"fit": 1}
    weight = model.model.layers[0].self_attn.k_proj.weight
    ((before,),) = (PROFILES.of_weight(weight).values(),)
    apack_compile.fit(model, [tokens(400, seed=1), tokens(400, seed=2)], OPTIONS)
    ((after,),) = (PROFILES.of_weight(weight).values(),)
    assert after is not before and after.fit is not before.fit
    assert after.fit is not None and after.fit.tokens == 792


WAYS: dict[str, Any] = {
    "compiled": lambda m: torch.compile(m, backend="attentionpack", options=OPTIONS),
    "in place": lambda m: m.compile(backend="attentionpack", options=OPTIONS) or m,
    "inference mode": lambda m: m,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_stands_for_the_model_inside(way: str) -> None:
    model = WAYS[way](zoo.llama().model)
    with torch.inference_mode(way == "inference mode"):
        summary = apack_compile.fit(model, [tokens(400)], OPTIONS, measure=False)
    assert len(summary.layers) == 2
    assert apack_compile.report(getattr(model, "_orig_mod", model)).graphs == 0
    model(input_ids=tokens(300))
    reports = apack_compile.report(getattr(model, "_orig_mod", model)).graph_reports
    assert [dict(g.runs) for g in reports] == ([] if way == "inference mode" else [{"encode": 1}])


# What is refused --------------------------------------------------------------------------------


def refused(batches: Any, words: str, model: Any = None, **more: Any) -> None:
    model = zoo.llama().model if model is None else model
    weights = [p for p in model.parameters()] if isinstance(model, nn.Module) else []
    with pytest.raises(FitError, match=re.escape(words)):
        apack_compile.fit(model, batches, OPTIONS, **more)
    assert all(not PROFILES.of_weight(w) for w in weights), "nothing is half fitted"


def test_no_batches_are_refused() -> None:
    refused([], "there are no batches: accepted is an iterable of batches, each a dict")
    refused(iter(()), "there are no batches")


@pytest.mark.parametrize("batches", [tokens(400), {"input_ids": tokens(400)}, "text"], ids=type)
def test_one_batch_alone_is_no_iterable_of_batches(batches: Any) -> None:
    refused(batches, f"batches is a {type(batches).__name__}: accepted is an iterable")


def test_a_batch_of_another_kind_is_refused() -> None:
    refused([tokens(400), [1, 2]], "batch 2 is a list: accepted is")


def test_a_batch_without_a_packed_cache_is_refused_with_the_reason() -> None:
    refused(
        [{"input_ids": tokens(400), "use_cache": False}],
        "batch 1 makes no cache that is packed: no cache: keys and values are not stored",
    )
    config = transformers.MistralConfig(**zoo.text_config(), sliding_window=64)
    refused(
        [tokens(400)],
        "batch 1 makes no cache that is packed: the whole cache is not stored (sliding window): "
        "left dense",
        zoo.make("MistralForCausalLM", config),
    )


def test_a_model_without_attention_is_refused() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    refused([torch.zeros(2)], "no attention with a growing cache", Twice().eval())
    untraced = nn.Linear(4, 4).eval()
    refused([torch.zeros(2, 4)], "Dynamo traced no graph of its forward", untraced)


def test_too_few_tokens_are_refused_with_their_number() -> None:
    refused(
        [tokens(60)],
        "the batches hold 56 of 128 tokens seen: give more or longer ones, or lower the option "
        "fit_tokens=0",
    )


def test_training_and_gradients_are_refused() -> None:
    refused([tokens(400)], "the model is in training mode", zoo.llama().model.train())
    model = zoo.llama().model
    embedded = model.model.embed_tokens(tokens(400)).requires_grad_()
    refused([{"inputs_embeds": embedded}], "batch 1 has inputs that require grad", model)


def test_what_is_no_model_is_refused() -> None:
    refused([tokens(400)], "model='llama': accepted is an nn.Module", "llama")


def test_options_are_those_of_the_backend() -> None:
    with pytest.raises(OptionError, match="did you mean 'ratio'"):
        apack_compile.fit(zoo.llama().model, [tokens(400)], {"ration": 8})
    with pytest.raises(OptionError, match="codec='exact' has nothing to fit"):
        apack_compile.fit(zoo.llama().model, [tokens(400)], {"codec": "exact"})


def test_a_fit_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.llama().model
    apack_compile.fit(model, [tokens(400)], OPTIONS, measure=False)
    weights = [layer.self_attn.k_proj.weight for layer in model.model.layers]
    before = [PROFILES.of_weight(w) for w in weights]

    def broken(*args: Any) -> FitSummary:
        raise torch.linalg.LinAlgError("eigh did not converge")

    monkeypatch.setattr(session, "fit_layers", broken)
    with pytest.raises(torch.linalg.LinAlgError):
        apack_compile.fit(model, [tokens(400, seed=1)], OPTIONS, measure=False)
    assert [PROFILES.of_weight(w) for w in weights] == before
    assert first_prompt(model, input_ids=tokens(300)) == {"encode": 1}


def test_a_mask_made_by_vmap() -> None:
    """Bug: what vmap leaves has no storage; no model of transformers 4.57 could be fitted."""
    batch = {"ids": tokens(400), "columns": torch.arange(400)}
    summary = apack_compile.fit(plain.MappedDecoder().eval(), [batch], OPTIONS)
    assert summary.reasons == () and len(summary.layers) == 2
