"""The importance of later tokens on a CUDA device: captured steps, and no wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import apack_compile
from apack_compile.cache import SideStore

from .. import zoo
from .test_capture_cuda import captures
from .test_cuda import on_device

pytestmark = pytest.mark.gpu

FITTED = {"ratio": 4, "fit_tokens": 64, "window": 8, "block": 32, "tiers": True}
STEPS = 100


def decode(compiled: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[SideStore]]:
    """Logits of given tokens that follow one by one, and the stores of the values."""
    cache, valid = transformers.DynamicCache(), inputs["attention_mask"]
    compiled(**inputs, past_key_values=cache)
    found = []
    for step in range(STEPS):
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], 1)
        token = torch.full_like(valid[:, :1], 20 + step)
        places = valid.sum(1, keepdim=True) - 1
        out = compiled(
            input_ids=token, attention_mask=valid, position_ids=places, past_key_values=cache
        )
        found.append(out.logits)
    return torch.cat(found, 1), [layer.values.store for layer in cache.layers]


def test_captured_steps_know_of_tokens_what_uncaptured_ones_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over three flushes of the ring, with padding; a step that is captured counts once."""
    made = captures(monkeypatch)
    case = on_device(zoo.llama(2, True, text=200))
    found = []
    for setting in (False, True):
        torch._dynamo.reset()
        options = {**FITTED, "profile_cache": False, "inductor": {"triton.cudagraphs": setting}}
        compiled = torch.compile(case.model, backend="attentionpack", options=options)
        decode(compiled, case.inputs)
        found.append(decode(compiled, case.inputs))
        assert bool(made) == setting
    assert sum(m.captures for m in made) and not any(m.reason for m in made)
    (logits, stores), (again, captured) = found
    torch.testing.assert_close(again, logits, rtol=1e-2, atol=1e-2)
    for one, two in zip(stores, captured, strict=True):
        assert one.coded == two.coded >= 200 + 64
        assert one.importance is not None and two.importance is not None
        mine, theirs = (s.importance[:, : s.recent] for s in (one, two))
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4)
        assert (mine > 0).all()
        same = one.side.payload[2][:, : one.coded] == two.side.payload[2][:, : two.coded]
        assert same.float().mean() > 0.95  # rounding may let two tokens change places
    assert apack_compile.report(case.model).recompiles == 0


def test_an_update_does_not_wait_for_the_device() -> None:
    q, ring = torch.randn(2, 4, 1, 64, device="cuda"), torch.randn(2, 2, 96, 64, device="cuda")
    importance, lengths = torch.rand(2, 96, device="cuda"), torch.tensor([40, 70], device="cuda")
    mask = torch.rand(2, 1, 1, 110, device="cuda") < 0.8
    before = importance.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        bias = torch.ops.apack.score_bias(mask, lengths, 0, 96, q.dtype)
        torch.ops.apack.update_importance_(importance, q, bias, ring, lengths, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = torch.ops.apack.running_importance(
        before.cpu(), q.cpu(), bias.cpu(), ring.cpu(), lengths.cpu(), 0.1
    )
    torch.testing.assert_close(importance.cpu(), want, rtol=1e-3, atol=1e-5)
