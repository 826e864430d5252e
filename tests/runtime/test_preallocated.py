"""Caches that a model allocates whole and writes in place: dense, and as large as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import apack_compile
from apack_compile.passes.find_updates import PREALLOCATED

from .. import zoo
from ..families.plain import Decoder, Layer, Preallocated, Sliced, by_hand, greedy

EXACT = {"codec": "exact", "inner": "eager"}
GENERATE: dict[str, Any] = dict(
    max_new_tokens=5, do_sample=False, cache_implementation="static", return_dict_in_generate=True
)


def check_report(model: Any) -> None:
    """A prefill graph and a decode graph; in both every site has the reason; nothing is packed."""
    report = apack_compile.report(model)
    reasons = [{skip.reason for skip in graph.skipped} for graph in report.graph_reports]
    assert reasons == [{PREALLOCATED}] * 2, str(report)
    assert (report.packed_graphs, report.attends) == (0, 0)
    assert (report.dense_bytes, report.packed_bytes, report.basis_bytes) == (0, 0, 0)
    assert "written in place" in str(report) and "memory does not shrink" in str(report)


def gemma2() -> zoo.Case:
    """A layer that keeps a window, by rolling its buffer, and one that keeps all."""
    config = transformers.Gemma2Config(
        **zoo.text_config(head_dim=16, query_pre_attn_scalar=16, sliding_window=8)
    )
    return zoo.Case(zoo.make("Gemma2ForCausalLM", config), zoo.prompt(0, 30, 1, padded=False))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_static_cache_is_left_dense_with_the_reason(family: str) -> None:
    """Bug: the reasons for a prefill that allocates it were a grown cache, or none at all."""
    case = zoo.llama(text=20, num_hidden_layers=1) if family == "llama" else gemma2()
    expected = case.model.generate(**case.inputs, **GENERATE)
    compiled = torch.compile(case.model, backend="attentionpack", options=EXACT)
    out = compiled.generate(**case.inputs, **GENERATE)
    assert torch.equal(out.sequences, expected.sequences)
    check_report(case.model)
    mine, theirs = (apack_compile.cache_bytes(x.past_key_values) for x in (out, expected))
    assert mine.packed == mine.unpacked == mine.dense == theirs.packed > 0


class Beside(Preallocated):
    """Prefill attends to what it has just made, and stores that in slices."""

    def store(
        self, k: Tensor, v: Tensor, start: int, positions: Tensor, past: Any
    ) -> tuple[Tensor, Tensor, Tensor | None, Any]:
        keys, values, mask, _ = Sliced.store(self, k, v, start, positions, past)  # type: ignore[arg-type]
        return (k, v, mask, None) if start == 0 else (keys, values, mask, None)


@pytest.mark.parametrize("attend", [F.scaled_dot_product_attention, by_hand])
@pytest.mark.parametrize("layer", [Preallocated, Sliced, Beside])
def test_buffers_are_left_dense_with_the_reason(layer: type[Layer], attend: Any) -> None:
    torch.manual_seed(0)
    model, inputs = Decoder(layer, attend).eval(), zoo.prompt(0, 40, 1, padded=False)
    want = greedy(model, inputs, 6)
    held = [buffer.clone() for buffer in model.buffers()]
    compiled = torch.compile(model, backend="attentionpack", options=EXACT)
    got = greedy(compiled, inputs, 6)
    assert torch.equal(got.tokens, want.tokens)
    check_report(model)
    for buffer, before in zip(model.buffers(), held, strict=True):
        assert type(buffer) is torch.Tensor and buffer.nbytes == before.nbytes
        torch.testing.assert_close(buffer, before)
