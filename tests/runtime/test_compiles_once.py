"""Compilations are bounded, and a graph that was compiled is a graph that runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import apack_compile

from .. import plain, zoo

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


class ScaledByLength(plain.PlainAttention):
    """Scores over the square root of the number of keys."""

    def forward(self, x: Tensor, past: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
        q, k, v = (
            part(x).view(*x.shape[:2], -1, self.dim).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        k_all, v_all = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = q @ k_all.transpose(2, 3) / k.shape[2] ** 0.5
        y = (scores + mask).softmax(-1) @ v_all
        return self.o(y.transpose(1, 2).flatten(2)), (k, v)


@torch.no_grad()
def test_a_scale_made_of_the_length_does_not_recompile() -> None:
    """Bug: a guard held each decode graph to the one length that it was compiled for."""
    torch.manual_seed(0)
    model = plain.PlainDecoder(layers=1).eval()
    model.layers[0] = ScaledByLength(64, 4, 2)
    compiled = torch.compile(model, backend="attentionpack", options={"codec": "exact", **AOT})
    inputs = zoo.prompt(0, 30, 2, padded=True)
    given = inputs["input_ids"], inputs["attention_mask"], 12, "float"
    want, _ = plain.plain_generate(model, *given)
    assert torch.equal(plain.plain_generate(compiled, *given)[0], want)
    report = apack_compile.report(model)
    assert (report.graphs, report.attends) == (2, 11)


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


def test_positions_that_are_a_column_of_what_grows() -> None:
    """Bug: they have other strides at each step; those of the first step were compiled in."""
    torch.manual_seed(0)
    model = plain.SpreadDecoder(2, hidden=256).eval()
    options = {"codec": "exact", "window": 16, "block": 16}
    compiled = torch.compile(model, backend="attentionpack", options=options)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, :5] = False
    ids = torch.randint(0, 50, (2, 40))
    past = dense = None
    for _ in range(6):
        new = ids.shape[1]
        positions = (valid.cumsum(1) - 1).clamp(min=0)[:, -new:]
        mask = plain.plain_masks(valid, new, "bool")
        got, past = compiled(ids, positions, past, mask)
        wanted, dense = model(ids, positions, dense, mask)
        torch.testing.assert_close(got, wanted)
        ids = wanted[:, -1:].argmax(-1)
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], 1)
    assert runs(model, "decode") == 5
    assert apack_compile.report(model).graphs <= 3
