"""The whole path on a CUDA device. Kernels of our own come later; the meaning is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import apack_compile
from apack_compile import PackedKV

from .. import zoo

pytestmark = pytest.mark.gpu

STEPS = 64


def on_device(case: zoo.Case, dtype: torch.dtype = torch.float32) -> zoo.Case:
    inputs = {
        name: t.to("cuda", dtype if t.is_floating_point() else t.dtype)
        for name, t in case.inputs.items()
    }
    return zoo.Case(case.model.to("cuda", dtype), inputs)


def generate(model: Any, case: zoo.Case) -> Any:
    return model.generate(
        **case.inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True
    )


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl", "smolvlm"])
def test_exact_codes_give_the_tokens_of_torchs_eager_backend(family: str) -> None:
    case = on_device(getattr(zoo, family)(3, True))
    case.model.compile(backend="eager")
    expected = generate(case.model, case).sequences
    torch._dynamo.reset()
    case = on_device(getattr(zoo, family)(3, True))
    compiled = torch.compile(case.model, backend="attentionpack", options={"codec": "exact"})
    out = generate(compiled, case)
    assert torch.equal(out.sequences, expected)
    assert apack_compile.report(case.model).attends == 2 * (STEPS - 1)


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl", "smolvlm"])
def test_a_prefill_that_encodes_gives_the_logits_of_an_eager_one(family: str) -> None:
    """Bug: keys were read in a layout that they were not written in (``compat.py``)."""
    case = on_device(getattr(zoo, family)(3, True))
    seen = case.inputs["attention_mask"].bool()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = case.model(**case.inputs).logits[seen]
        compiled = torch.compile(case.model, backend="attentionpack", options={"codec": "exact"})
        for _ in range(2):
            torch.testing.assert_close(
                compiled(**case.inputs).logits[seen], expected, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ratio_8_stays_packed_on_the_device_and_compiles_once(dtype: torch.dtype) -> None:
    case = on_device(zoo.llama(2, True, text=500), dtype)
    compiled = torch.compile(case.model, backend="attentionpack", options={"ratio": 8})
    for _ in range(2):  # learns, then encodes in the graph
        out = generate(compiled, case)
    keys = out.past_key_values.layers[0].keys
    assert isinstance(keys, PackedKV) and keys.device.type == "cuda" and keys.dtype == dtype
    assert keys.store.side.payload[0].device.type == "cuda"
    report = apack_compile.report(case.model)
    assert (report.graphs, report.recompiles) == (2, 0)
    assert report.attends == 2 * 2 * (STEPS - 1)


def test_packed_attention_equals_attention_to_the_unpacked_cache() -> None:
    case = on_device(zoo.llama(2, True, text=300))
    compiled = torch.compile(case.model, backend="attentionpack", options={"ratio": 4})
    cache = generate(compiled, case).past_key_values
    token = torch.tensor([[20], [30]], device="cuda")
    import transformers

    twin = transformers.DynamicCache()
    for i, layer in enumerate(cache.layers):
        twin.update(layer.keys.unpack(), layer.values.unpack(), i)
    got = compiled(input_ids=token, past_key_values=cache).logits
    with torch.compiler.set_stance("force_eager"):
        want = case.model(input_ids=token, past_key_values=twin).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_offload_and_back_keeps_the_cache_packed() -> None:
    case = on_device(zoo.llama(1, False, text=300))
    compiled = torch.compile(case.model, backend="attentionpack", options={"codec": "exact"})
    layer = generate(compiled, case).past_key_values.layers[0]
    before = layer.keys.unpack()
    layer.offload()
    assert isinstance(layer.keys, PackedKV) and layer.keys.device.type == "cpu"
    layer.prefetch()
    assert layer.keys.device.type == "cuda" and torch.equal(layer.keys.unpack(), before)
