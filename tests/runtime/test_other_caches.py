"""Caches that save memory by themselves are left alone, with the reason."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, QuantizedLayer

import apack_compile
from apack_compile import PackedKV
from apack_compile.passes.find_updates import CUT_TOO

from .. import zoo

EXACT = {"codec": "exact", "inner": "eager", "window": 8, "block": 16}
STEPS = 20

CUT = "keys or values are an input that this graph does not grow (cross-attention?)"
"""Waiting for a stream breaks graphs between cache and attention."""


class Rounded(QuantizedLayer):
    """8 bits a number: what Quanto and HQQ do is theirs, and so are their packages."""

    def __init__(self) -> None:
        super().__init__(residual_length=8)

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        size = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / size).round().to(torch.int8), size

    def _dequantize(self, q_tensor: tuple[Tensor, Tensor]) -> Tensor:
        return q_tensor[0] * q_tensor[1]


def decode(model: Any, ids: Tensor, cache: Cache) -> Tensor:
    tokens = []
    for _ in range(STEPS):
        logits = model(input_ids=ids, past_key_values=cache).logits
        ids = logits[:, -1:].argmax(-1)
        tokens.append(ids)
    return torch.cat(tokens, 1)


def test_a_quantized_cache_is_left_alone_and_the_report_says_why() -> None:
    case = zoo.llama(text=40, num_hidden_layers=1)
    ids = case.inputs["input_ids"]
    want = decode(case.model, ids, Cache(layers=[Rounded()]))
    cache = Cache(layers=[Rounded()])
    ours = torch.compile(case.model, backend="attentionpack", options=EXACT)
    assert torch.equal(decode(ours, ids, cache), want)
    layer = cache.layers[0]
    assert layer._quantized_keys[0].dtype == torch.int8 and layer._quantized_keys[0].shape[2] > 41
    assert not isinstance(layer.keys, PackedKV)
    report = apack_compile.report(case.model)
    assert (report.packed_graphs, report.attends) == (0, 0)
    assert all(graph.skipped for graph in report.graph_reports), str(report)


class NoStream:
    """A CPU has no streams: what would be done beside, is done at once."""

    def __enter__(self) -> NoStream:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def wait_stream(self, stream: NoStream) -> None:
        pass


def offloaded() -> transformers.DynamicCache:
    with mock.patch.object(torch, "Stream", NoStream):  # without a GPU not every release has one
        return transformers.DynamicCache(offloading=True)


def test_an_offloaded_cache_is_left_alone_and_the_report_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU it moves every layer to the host and back; here it goes through the same code."""
    case = zoo.llama(text=40, num_hidden_layers=1)
    ids = case.inputs["input_ids"]
    want = decode(case.model, ids, transformers.DynamicCache())
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    cache = offloaded()
    ours = torch.compile(case.model, backend="attentionpack", options=EXACT)
    assert torch.equal(decode(ours, ids, cache), want)
    assert not any(isinstance(layer.keys, PackedKV) for layer in cache.layers)
    report = apack_compile.report(case.model)
    assert (report.packed_graphs, report.attends) == (0, 0)
    reasons = {skip.reason for graph in report.graph_reports for skip in graph.skipped}
    assert reasons == {CUT}


class Shared(DynamicSlidingWindowLayer):
    """Keeps the whole of a step for layers that share it, as Gemma 3n of transformers 4 does."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.whole = super().update(*args, **kwargs)
        return self.whole


@pytest.mark.parametrize("text", [40, 8], ids=["behind the window", "within the window"])
def test_the_whole_beside_a_sliding_window_is_left_alone_and_full_layers_attend_at_every_step(
    text: int,
) -> None:
    """Bug: it was packed, and every step ran uncompiled to learn codes of what it left behind."""
    config = transformers.Gemma2Config(
        **zoo.text_config(head_dim=16), query_pre_attn_scalar=16, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = zoo.make("Gemma2ForCausalLM", config)
    ids = zoo.prompt(0, text, 1, False)["input_ids"]
    want = decode(model, ids, Cache(layers=[Shared(16), DynamicLayer()]))
    cache = Cache(layers=[Shared(16), DynamicLayer()])
    ours = torch.compile(model, backend="attentionpack", options={**EXACT, "codec": "transform"})
    assert torch.equal(decode(ours, ids, cache), want)
    sliding, full = cache.layers
    assert not any(isinstance(x, PackedKV) for x in (sliding.keys, *sliding.whole))
    assert isinstance(full.keys, PackedKV)
    report = apack_compile.report(model)
    assert report.attends == STEPS - 1, str(report)
    assert [[skip.reason for skip in g.skipped] for g in report.graph_reports] == [
        [CUT_TOO] for _ in report.graph_reports
    ]
    assert sum(count for g in report.graph_reports for what, count in g.runs if what == "fit") == 1
