"""Keys and values of an encoder or an image are packed once, and read at every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import apack_compile
from apack_compile.cache import PackedKV

from .. import zoo
from ..families import registry

ENCODED = 150

OPTIONS: dict[str, Any] = dict(
    inner="eager", window=8, block=16, fit_tokens=64, profile_cache=False
)


def t5(decoder: int = 1) -> tuple[Any, dict[str, Tensor]]:
    """A model, and a long prompt of its encoder, the first row padded."""
    model = registry.make("t5").model
    inputs = zoo.prompt(0, ENCODED, 2, False)
    inputs["attention_mask"][0, -40:] = 0
    words = zoo.prompt(0, decoder, 2, False)["input_ids"]
    return model, {**inputs, "decoder_input_ids": words}


def decode(model: Any, inputs: Mapping[str, Any], **settings: Any) -> Any:
    settings = {"max_new_tokens": 12, "do_sample": False, **settings}
    return model.generate(
        **inputs, **settings, return_dict_in_generate=True, output_logits=True,
        suppress_tokens=[zoo.IMAGE],
    )  # fmt: skip


def crossing(out: Any) -> Iterator[PackedKV]:
    """What the decoder reads of its encoder."""
    for layer in out.past_key_values.cross_attention_cache.layers:
        for tensor in (layer.keys, layer.values):
            assert isinstance(tensor, PackedKV)
            yield tensor


@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_read_of_an_encoder_is_packed_once(beams: int) -> None:
    model, inputs = t5()
    want = decode(model, inputs, num_beams=beams)
    compiled = torch.compile(model, backend="attentionpack", options={**OPTIONS, "codec": "exact"})
    got = decode(compiled, inputs, num_beams=beams)
    assert torch.equal(got.sequences, want.sequences)
    report = apack_compile.report(model)
    decoders = [g for g in report.graph_reports if g.packed]
    assert [len(g.packed) for g in decoders] == [4, 4]
    assert not any(g.skipped for g in decoders)
    assert report.attends == 4 * 11
    for handle in crossing(got):
        assert handle.shape[2] == ENCODED + 1
        assert handle.store is not None and handle.store.recent == 0  # no token of it is recent


def test_at_ratio_8_it_is_coded_from_the_first_prompt_on() -> None:
    model, inputs = t5()
    want = decode(model, inputs)
    compiled = torch.compile(model, backend="attentionpack", options={**OPTIONS, "ratio": 8})
    first, second = decode(compiled, inputs), decode(compiled, inputs)
    for got in (first, second):
        near = (got.logits[1] - want.logits[1]).norm() / want.logits[1].norm()
        assert 0 < near < 0.5
        for handle in crossing(got):
            assert handle.store is not None and handle.store.ref.layout.kind == "transform"
            assert handle.store.coded == ENCODED + 1
    runs = [dict(g.runs) for g in apack_compile.report(model).graph_reports if g.packed]
    assert {"fit", "decode"} <= set().union(*runs)
    notes = {n for g in apack_compile.report(model).graph_reports for _, n in g.notes}
    assert "sensitivity not measured (cross-attention): the same bits in every layer" in notes
    assert any("packed exactly" in note for note in notes)  # its own first token is one


def test_both_kinds_of_layers_are_kept_and_carried(tmp_path: Path) -> None:
    model, inputs = t5(decoder=80)
    options = {**OPTIONS, "ratio": 8, "profile_cache": True}
    compiled = torch.compile(model, backend="attentionpack", options=options)
    want = decode(compiled, inputs, max_new_tokens=4)
    info = apack_compile.save_profile(model, tmp_path / "codes.safetensors")
    assert info.layers == 4
    origins = [g.profile for g in apack_compile.report(model).graph_reports if g.profile]
    assert origins and all(origin.count("saved to") == 2 for origin in origins)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="attentionpack", options=options)
    found = decode(compiled, inputs, max_new_tokens=4)
    runs = [dict(g.runs) for g in apack_compile.report(model).graph_reports if g.packed]
    assert not any("fit" in run for run in runs)

    torch._dynamo.reset()
    apack_compile.load_profile(model, tmp_path / "codes.safetensors")
    options["profile_cache"] = False
    compiled = torch.compile(model, backend="attentionpack", options=options)
    loaded = decode(compiled, inputs, max_new_tokens=4)
    runs = [dict(g.runs) for g in apack_compile.report(model).graph_reports if g.packed]
    assert not any("fit" in run for run in runs)
    for got in (found, loaded):
        for mine, theirs in zip(got.logits[1:3], want.logits[1:3], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_codes_can_be_fitted_beforehand() -> None:
    model, inputs = t5(decoder=80)
    summary = apack_compile.fit(model, [inputs], options={**OPTIONS, "ratio": 8})
    assert len(summary.layers) == 4
    assert any("cross-attention" in reason for reason in summary.reasons)
    compiled = torch.compile(model, backend="attentionpack", options={**OPTIONS, "ratio": 8})
    decode(compiled, inputs, max_new_tokens=4)
    runs = [dict(g.runs) for g in apack_compile.report(model).graph_reports if g.packed]
    assert not any("fit" in run for run in runs)


def test_a_step_without_a_dense_copy_is_compiled_once() -> None:
    """Whatever the capacities of the two kinds of caches happen to be."""
    model, inputs = t5(decoder=ENCODED + 1)
    compiled = torch.compile(model, backend="attentionpack", options={**OPTIONS, "codec": "exact"})
    want = decode(model, inputs, max_new_tokens=60)
    got = decode(compiled, inputs, max_new_tokens=60)
    assert torch.equal(got.sequences, want.sequences)
    assert apack_compile.report(model).recompiles == 0


def test_an_image_behind_cross_attention_is_packed_once() -> None:
    case = registry.make("mllama")
    want = decode(case.model, case.inputs)
    options = {**OPTIONS, "codec": "exact"}
    compiled = torch.compile(case.model, backend="attentionpack", options=options)
    got = decode(compiled, case.inputs)
    assert torch.equal(got.sequences, want.sequences)
    packed = [layer.keys for layer in got.past_key_values.layers]
    assert all(isinstance(keys, PackedKV) for keys in packed) and len(packed) == 3
    assert isinstance(case.model, transformers.MllamaForConditionalGeneration)
