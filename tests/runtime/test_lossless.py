"""With exact codes, everything that comes out is what torch's own eager backend gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import apack_compile
from apack_compile import PackedKV

from .. import zoo

EXACT = {"codec": "exact"}
STEPS = 64


def generate(model: Any, inputs: dict[str, Any], steps: int = STEPS) -> Any:
    return model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True
    )


def by_torch(case: zoo.Case, steps: int = STEPS) -> torch.Tensor:
    case.model.compile(backend="eager")
    return generate(case.model, case.inputs, steps).sequences


def by_us(case: zoo.Case, steps: int = STEPS, **options: Any) -> Any:
    compiled = torch.compile(case.model, backend="attentionpack", options={**EXACT, **options})
    return generate(compiled, case.inputs, steps)


@pytest.mark.parametrize(("batch", "padded"), [(1, False), (3, True)])
@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl", "smolvlm"])
def test_generate_gives_the_tokens_of_torchs_eager_backend(
    family: str, batch: int, padded: bool
) -> None:
    build = getattr(zoo, family)
    case = build(batch, padded)
    # Tracing and compiling take longest. Eager mode runs the operators of backend="eager", and one
    # family goes through Inductor.
    expected = generate(case.model, case.inputs).sequences if padded else by_torch(case)
    torch._dynamo.reset()
    case = build(batch, padded)
    out = by_us(case, inner="inductor" if family == "llava" and not padded else "eager")
    assert torch.equal(out.sequences, expected)
    assert all(isinstance(layer.keys, PackedKV) for layer in out.past_key_values.layers)
    assert apack_compile.report(case.model).attends == 2 * (STEPS - 1)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize(("batch", "padded"), [(1, False), (3, True)])
def test_hand_written_decoder_gives_the_tokens_of_torchs_eager_backend(
    batch: int, padded: bool, mask: str
) -> None:
    if padded and mask == "none":
        padded = False  # without a mask a padded row has no meaning
    inputs = zoo.prompt(0, 90, batch, padded)
    ids, valid = inputs["input_ids"], inputs["attention_mask"]
    stock = torch.compile(zoo.plain_decoder(), backend="eager")
    expected, _ = zoo.plain_generate(stock, ids, valid, STEPS, mask)
    torch._dynamo.reset()
    model = zoo.plain_decoder()
    inner = "inductor" if mask == "float" and not padded else "eager"
    ours = torch.compile(model, backend="attentionpack", options={**EXACT, "inner": inner})
    tokens, past = zoo.plain_generate(ours, ids, valid, STEPS, mask)
    assert torch.equal(tokens, expected)
    assert all(isinstance(side, PackedKV) for layer in past for side in layer)
    assert apack_compile.report(model).attends == 2 * (STEPS - 1)
