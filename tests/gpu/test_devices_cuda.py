"""Layers of one model on two CUDA devices: each cache is packed, and attended to, on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import apack_compile
from apack_compile import PackedKV

from .. import plain, zoo

DEVICES = torch.cuda.device_count()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICES < 2, reason=f"needs two CUDA devices, there are {DEVICES}"),
]

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
PROMPT, STEPS = 500, 48
"""More steps than the window and a block hold: rings are coded on the way."""

EXACT = {"codec": "exact", "window": 16, "block": 16}
RATIO_8 = {"ratio": 8, "window": 16, "block": 16}


@dataclass
class Spread:
    """A model, its twin on one device, and how they are called.

    ``step(model, ids, valid, cache)`` gives logits of the last token and the cache, and
    ``sides(cache)`` keys and values of each layer.
    """

    model: Any
    twin: Any
    step: Callable[[Any, Tensor, Tensor, Any], tuple[Tensor, Any]]
    sides: Callable[[Any], list[tuple[Any, Any]]]
    unpacked: Callable[[Any], Any]


def by_hand(dtype: torch.dtype) -> Spread:
    """A decoder that moves hidden states itself; its cache is a tuple."""

    def make() -> plain.SpreadDecoder:
        torch.manual_seed(0)
        return plain.SpreadDecoder(2, hidden=256).eval().to(FIRST, dtype)

    def step(model: Any, ids: Tensor, valid: Tensor, cache: Any) -> tuple[Tensor, Any]:
        new = ids.shape[1]
        mask = plain.plain_masks(valid.cpu(), new, "bool")
        assert mask is not None
        positions = (valid.cumsum(1) - 1).clamp(min=0)[:, -new:]
        logits, cache = model(ids, positions, cache, mask.to(FIRST))
        return logits[:, -1].to(FIRST), cache

    def unpacked(cache: Any) -> Any:
        return tuple(tuple(side.unpack() for side in layer) for layer in cache)

    model = make()
    for part in (model.layers[1], model.norms[1], model.head):
        part.to(SECOND)
    return Spread(model, make(), step, lambda cache: [tuple(layer) for layer in cache], unpacked)


def by_accelerate(dtype: torch.dtype) -> Spread:
    """A model of transformers that accelerate's hooks spread."""
    changes = {"head_dim": 64, "hidden_size": 128}

    def step(model: Any, ids: Tensor, valid: Tensor, cache: Any) -> tuple[Tensor, Any]:
        cache = transformers.DynamicCache() if cache is None else cache
        out = model(input_ids=ids, attention_mask=valid.long(), past_key_values=cache)
        return out.logits[:, -1].to(FIRST), out.past_key_values

    def sides(cache: Any) -> list[tuple[Any, Any]]:
        return [(layer.keys, layer.values) for layer in cache.layers]

    def unpacked(cache: Any) -> Any:
        dense = transformers.DynamicCache()
        for number, (keys, values) in enumerate(sides(cache)):
            dense.update(keys.unpack(), values.unpack(), number)
        return dense

    where = {
        "model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0,
        "model.layers.1": 1, "model.norm": 1, "lm_head": 1,
    }  # fmt: skip
    model = accelerate.dispatch_model(zoo.llama(**changes).model.to(dtype), where)
    twin = zoo.llama(**changes).model.to(FIRST, dtype)
    return Spread(model, twin, step, sides, unpacked)


KINDS = {"by hand": by_hand, "by accelerate": by_accelerate}


def prompt() -> tuple[Tensor, Tensor]:
    """Tokens, and which count: the first sequence is padded on the left."""
    inputs = zoo.prompt(0, PROMPT - 1, 2, True)
    return inputs["input_ids"].to(FIRST), inputs["attention_mask"].bool().to(FIRST)


def decode(
    spread: Spread, model: Any, tokens: Tensor | None = None, steps: int = STEPS
) -> tuple[Tensor, Tensor, Any]:
    """Tokens ``[B, steps]``, greedy or as given, the logits they have, the cache."""
    (ids, valid), cache, chosen, every = prompt(), None, [], []
    for number in range(steps):
        logits, cache = spread.step(model, ids, valid, cache)
        every.append(logits)
        chosen.append(logits.argmax(-1) if tokens is None else tokens[:, number])
        ids = chosen[-1][:, None]
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], 1)
    return torch.stack(chosen, 1), torch.stack(every, 1), cache


def check_where(spread: Spread, cache: Any) -> None:
    """Every layer's cache is packed, and all of it lies on the device of its weights."""
    for number, (layer, device) in enumerate(
        zip(spread.sides(cache), (FIRST, SECOND), strict=True)
    ):
        for name, side in zip(("keys", "values"), layer, strict=True):
            where = f"{name} of layer {number}"
            assert isinstance(side, PackedKV), f"{where}: {type(side)} is not packed"
            assert side.device == device, f"{where} are on {side.device}, not on {device}"
            tensors = {str(t.device) for t in side.store.tensors()}
            assert tensors == {str(device)}, f"what {where} are made of is on {tensors}"


def check_report(model: Any, steps: int) -> None:
    """Two sites are packed, and attended to at every step."""
    report = apack_compile.report(model)
    assert report.attends == 2 * (steps - 1), f"{report.attends} packed attention calls\n{report}"
    assert report.packed_bytes > 0, str(report)
    left = {skip.reason for graph in report.graph_reports for skip in graph.skipped}
    assert not left, f"left alone: {left}\n{report}"


@pytest.mark.parametrize("kind", KINDS)
def test_exact_codes_give_the_tokens_of_eager_mode(kind: str) -> None:
    spread = KINDS[kind](torch.float32)
    want, right, _ = decode(spread, spread.model)
    torch._dynamo.reset()
    ours = torch.compile(spread.model, backend="attentionpack", options=EXACT)
    got, logits, cache = decode(spread, ours)
    off = (logits - right).abs().amax((0, 2))
    assert torch.equal(got, want), f"tokens differ; logits are off by, at each step: {off.tolist()}"
    torch.testing.assert_close(logits, right, rtol=1e-3, atol=1e-3)
    check_where(spread, cache)
    check_report(spread.model, STEPS)


def error(logits: Tensor, right: Tensor) -> float:
    """Relative, of logits over what tells them apart."""
    right = right.double()
    spread = right - right.mean(-1, keepdim=True)
    return float((logits.double() - right).norm() / spread.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_ratio_8_is_as_close_as_on_one_device(kind: str) -> None:
    spread = KINDS[kind](torch.bfloat16)
    tokens, right, _ = decode(spread, spread.twin)
    errors = {}
    for name, model in (("one device", spread.twin), ("two devices", spread.model)):
        torch._dynamo.reset()
        ours = torch.compile(model, backend="attentionpack", options=RATIO_8)
        decode(spread, ours, tokens, steps=3)  # learns the codes
        _, logits, cache = decode(spread, ours, tokens)
        errors[name] = error(logits[:, 1:], right[:, 1:])
    assert errors["two devices"] < 1.5 * errors["one device"] + 0.05, str(errors)
    check_where(spread, cache)
    check_report(spread.model, STEPS + 3 - 1)
    report = apack_compile.report(spread.model)
    assert report.dense_bytes > 2 * report.packed_bytes, str(report)
    assert len(report.errors) == 4, f"keys and values of two layers have codes\n{report}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_step_is_attention_to_what_is_packed(kind: str) -> None:
    spread = KINDS[kind](torch.bfloat16)
    ours = torch.compile(spread.model, backend="attentionpack", options=RATIO_8)
    tokens, _, _ = decode(spread, ours, steps=3)
    tokens, _, cache = decode(spread, ours)
    _, valid = prompt()
    valid = torch.cat([valid, valid.new_ones(2, STEPS)], 1)
    dense, last = spread.unpacked(cache), tokens[:, -1:]
    got, _ = spread.step(ours, last, valid, cache)
    with torch.compiler.set_stance("force_eager"):
        want, _ = spread.step(spread.model, last, valid, dense)
    found = error(got, want)
    assert found < 0.03, f"relative error {found} where rounding to bfloat16 is all that differs"


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_run_on_the_device_of_each_layer(kind: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    spread = KINDS[kind](torch.bfloat16)
    ours = torch.compile(spread.model, backend="attentionpack", options=RATIO_8)
    for _ in range(2):
        tokens, _, cache = decode(spread, ours)
    _, valid = prompt()
    valid = torch.cat([valid, valid.new_ones(2, STEPS)], 1)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        spread.step(ours, tokens[:, -1:], valid, cache)
        for device in (FIRST, SECOND):
            torch.cuda.synchronize(device)
    events = [e for e in profiler.events() or () if e.device_type == DeviceType.CUDA]
    if not events:
        pytest.skip("the profiler sees no kernels on this machine")
    for kernel in ("fold_kernel", "attend_kernel", "merge_kernel"):
        seen = sorted(e.device_index for e in events if kernel in e.name)
        names = sorted({e.name[:60] for e in events})
        assert seen == [0, 1], f"{kernel} ran on devices {seen}; there were {names}"
