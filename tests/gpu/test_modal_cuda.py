"""Codes by kind of token on a CUDA device: captured steps, with kernels of ours and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import apack_compile
from apack_compile import PackedKV
from apack_compile.ops.attend_cuda import by_kernels

from .. import zoo
from .test_cuda import on_device

pytestmark = pytest.mark.gpu

EVERY = {"text_ratio": 3, "tiers": True, "evict": 0.4, "exact_share": 0.03}
OPTIONS = {"visual_ratio": 6, "fit_tokens": 64, "window": 16, "profile_cache": False}

FAMILIES = {
    "llava": lambda: zoo.llava(2, True, text=200, side=112),
    "qwen2_vl": lambda: zoo.qwen2_vl(2, True, text=200, grid=12),
}


def decoded(model: Any, case: zoo.Case, steps: int) -> tuple[Any, torch.Tensor]:
    cache = transformers.DynamicCache()
    model(**case.inputs, past_key_values=cache)
    logits = []
    for step in range(steps):
        ids = torch.full((2, 1), 20 + step, device="cuda")
        logits.append(model(input_ids=ids, past_key_values=cache).logits)
    return cache, torch.cat(logits, 1)


@pytest.mark.parametrize("k_code", ["post-rope", "pre-rope"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_inductor_gives_what_eager_operators_give(family: str, k_code: str) -> None:
    """Over a flush of the ring; steps are captured from the second on."""
    found = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        case = on_device(FAMILIES[family]())
        options = {**OPTIONS, "inner": inner, "k_code": k_code}
        ours = torch.compile(case.model, backend="attentionpack", options=options)
        decoded(ours, case, 1)
        cache, logits = decoded(ours, case, 60)
        found.append(logits)
        coded = case.inputs["input_ids"].shape[1] - OPTIONS["window"]
        for layer in cache.layers:
            for side in (layer.keys, layer.values):
                assert isinstance(side, PackedKV) and side.store is not None
                kinds = side.store.side.payload[0][..., 0] == 1
                image = case.inputs["input_ids"] == zoo.IMAGE
                assert torch.equal(kinds[:, :coded], image[:, :coded])
                assert side.store.coded > coded
                assert not kinds[:, coded : side.store.coded].any()
        assert apack_compile.report(case.model).recompiles == 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_codes_by_kind_with_all_other_options() -> None:
    """Tiers of later tokens, dropped visual ones and shares of exact tokens, captured steps."""
    found = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        case = on_device(FAMILIES["llava"]())
        options = {**OPTIONS, **EVERY, "inner": inner}
        ours = torch.compile(case.model, backend="attentionpack", options=options)
        decoded(ours, case, 1)
        cache, logits = decoded(ours, case, 60)
        found.append((logits, [side.store for x in cache.layers for side in (x.keys, x.values)]))
        assert apack_compile.report(case.model).recompiles == 0
    for one, two in zip(found[0][1], found[1][1], strict=True):
        assert one.ref.layout.evicts and one.ref.layout.kept and one.rows == two.rows
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_sixteen_bits_are_attended_by_kernels(dtype: torch.dtype) -> None:
    case = on_device(zoo.llama(2, True, text=400), dtype)
    ours = torch.compile(case.model, backend="attentionpack", options=OPTIONS)
    for start, count in ((10, 200), (10, 200), (0, 0), (50, 320)):
        here = torch.arange(401, device="cuda")
        mask = ((here >= start) & (here < start + count)).expand(2, -1)
        with apack_compile.visual_tokens(mask):
            cache, logits = decoded(ours, case, 40)
        assert logits.isfinite().all()
        store = cache.layers[0].keys.store
        specs = [
            side.store.ref.layout.spec for side in (cache.layers[0].keys, cache.layers[0].values)
        ]
        q = torch.empty(2, store.ref.layout.heads, 1, 1, dtype=dtype, device="cuda")
        assert by_kernels(q, *specs)
        assert int((store.side.payload[0][:, :385, 0] == 1).sum()) == 2 * int(mask[0, :385].sum())
        dense = transformers.DynamicCache()
        for number, layer in enumerate(cache.layers):
            dense.update(layer.keys.unpack(), layer.values.unpack(), number)
        ids = torch.full((2, 1), 9, device="cuda")
        want = case.model(input_ids=ids, past_key_values=dense).logits
        got = ours(input_ids=ids, past_key_values=cache).logits
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)
    assert apack_compile.report(case.model).recompiles == 0
