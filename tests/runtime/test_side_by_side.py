"""A model whose heads lie side by side, with a bias of each: every way of decoding is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import apack_compile
from apack_compile import PackedKV

from .. import zoo
from ..families import registry

EXACT = {"codec": "exact", "inner": "eager", "window": 8, "block": 16}
CLOSE = {"rtol": 0.0, "atol": 1e-5}
STEPS = 24


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Any, Any]]:
    """One layer of BLOOM, whose weights tell tokens apart, and the same compiled."""
    torch._dynamo.reset()
    config = transformers.BloomConfig(
        vocab_size=zoo.VOCAB, hidden_size=64, n_layer=1, n_head=4, eos_token_id=None, pad_token_id=0
    )
    model = zoo.make("BloomForCausalLM", config)
    registry.untie(model)
    registry.enlarge(model)
    yield model, torch.compile(model, backend="attentionpack", options=EXACT)
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    """Tests of this module share their graphs: tracing takes the time."""


def packs(model: Any, out: Any) -> None:
    """Nothing is left dense."""
    report = apack_compile.report(model)
    assert report.sites == 1 and report.attends > 0
    assert not [skip for graph in report.graph_reports for skip in graph.skipped], str(report)
    assert all(isinstance(layer.keys, PackedKV) for layer in out.past_key_values.layers)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_padding_gives_the_dense_tokens(both: tuple[Any, Any], beams: int) -> None:
    model, ours = both
    inputs = zoo.prompt(0, 40, 2, padded=True)
    settings: dict[str, Any] = dict(
        do_sample=False, num_beams=beams, max_new_tokens=STEPS, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    want = model.generate(**inputs, **settings)
    got = ours.generate(**inputs, **settings)
    assert torch.equal(got.sequences, want.sequences)
    for mine, theirs in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    packs(model, got)


@torch.no_grad()
def test_several_tokens_on_a_packed_cache_attend_to_codes(both: tuple[Any, Any]) -> None:
    model, ours = both
    inputs = zoo.prompt(0, 51, 2, padded=True)
    ids, seen = inputs["input_ids"], inputs["attention_mask"]

    def run(called: Any) -> tuple[list[Tensor], Any]:
        out, logits = called(ids[:, :40], attention_mask=seen[:, :40], use_cache=True), []
        for start in range(40, ids.shape[1], 6):
            stop = min(start + 6, ids.shape[1])
            out = called(
                ids[:, start:stop], attention_mask=seen[:, :stop], use_cache=True,
                past_key_values=out.past_key_values,
            )  # fmt: skip
            logits.append(out.logits)
        return logits, out

    want, _ = run(model)
    got, out = run(ours)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    packs(model, out)
