"""Tiers, dropped and exact tokens, codes by kind inside graphs that Inductor makes for CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("triton", reason="Triton is not installed")

import apack_compile
from apack_compile.ops.attend_cuda import by_kernels

from .. import zoo
from ..kernels.test_triton_rows import PAIRS, case
from .graphs import attended
from .test_cuda import on_device

pytestmark = pytest.mark.gpu

EXPECTED = {
    "tiers": {"rank_kernel", "spread_kernel"},
    "evict": {"rank_kernel", "prepare_kernel", "value_slots_kernel"},
    "evict and tiers": {"rank_kernel", "spread_kernel", "prepare_kernel", "value_slots_kernel"},
    "kept": {"prepare_kernel", "value_slots_kernel"},
    "kinds": {"rank_kernel", "prepare_kernel", "value_slots_kernel"},
    "kinds, tiers and evict": {
        "rank_kernel",
        "spread_kernel",
        "prepare_kernel",
        "value_slots_kernel",
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_graph_launches_our_kernels_and_makes_no_dense_tensor(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = attended(case(*PAIRS[name], length=20_000, dtype=torch.bfloat16), monkeypatch)
    for kernel in EXPECTED[name] | {"attend_kernel", "merge_kernel"}:
        assert f"{kernel}_" in found.code
    assert "ops.apack.attend" not in found.code and "extern_kernels." not in found.code
    dense = 2 * 2 * 20_000 * 64 * 2  # of the keys alone
    assert found.peak < dense / 2
    assert found.error < torch.finfo(torch.bfloat16).eps


OPTIONS: dict[str, dict[str, Any]] = {
    "tiers": {"tiers": True},
    "exact_share": {"exact_share": 0.03},
    "all three": {"tiers": True, "evict": 0.3, "exact_share": 0.03},
    "before rotation": {"tiers": True, "evict": 0.3, "k_code": "pre-rope"},
}


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_model_decodes_by_kernels_as_by_plain_operators(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts with left padding, rings coded on the way, captured steps."""
    options = {"ratio": 4, "window": 16, "block": 32, "fit_tokens": 64, "profile_cache": False}
    found = []
    for choice, inner in (("plain", "eager"), ("triton_op", "inductor")):
        monkeypatch.setenv("APACK_ATTEND", choice)
        torch._dynamo.reset()
        model, logits = None, []
        for text in (300, 350):
            made = on_device(zoo.llama(2, True, text=text), torch.bfloat16)
            if model is None:
                model, more = made.model, {**options, **OPTIONS[name], "inner": inner}
                ours = torch.compile(model, backend="attentionpack", options=more)
            cache, valid = transformers.DynamicCache(), made.inputs["attention_mask"]
            ours(**made.inputs, past_key_values=cache)
            for step in range(50):
                valid = torch.cat([valid, torch.ones_like(valid[:, :1])], 1)
                places = valid.sum(1, keepdim=True) - 1
                token = torch.full_like(valid[:, :1], 20 + step)
                out = ours(
                    input_ids=token, attention_mask=valid, position_ids=places,
                    past_key_values=cache,
                )  # fmt: skip
                logits.append(out.logits)
        stores = [side.store for side in (cache.layers[0].keys, cache.layers[0].values)]
        specs = [store.ref.layout.spec for store in stores]
        q = torch.empty(2, stores[0].ref.layout.heads, 1, 1, dtype=torch.bfloat16, device="cuda")
        assert by_kernels(q, *specs) == (choice == "triton_op")
        found.append(torch.cat(logits, 1).double())
        assert apack_compile.report(model).recompiles == 0
    # Levels of later tokens go by weights that rounding moves: some tokens change places.
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert error < 8 * torch.finfo(torch.bfloat16).eps, f"relative error {error:.2e}"
