"""The options that the benchmark times, on a CPU."""

from __future__ import annotations

import pytest
import torch

options_gpu = pytest.importorskip("benchmarks.options_gpu")

TOKENS = 256
CASE = options_gpu.Case(2, 4, 4, TOKENS)


@pytest.mark.parametrize("name", options_gpu.variants(*options_gpu.layouts(CASE, mixed=True)))
def test_what_is_timed_is_attention(name: str) -> None:
    k, v = options_gpu.variants(*options_gpu.layouts(CASE, mixed=True))[name]
    x = torch.randn(2, 4, TOKENS, options_gpu.DIM)
    importance = torch.rand(2, TOKENS)
    sides = [options_gpu.packed(layout, x, importance) for layout in (k, v)]
    lengths = torch.tensor([TOKENS - options_gpu.LIVE, options_gpu.LIVE])
    q = torch.randn(2, 4, 1, options_gpu.DIM) / 8
    out = torch.ops.apack.attend(q, None, *sides, lengths, 1.0, k.spec, v.spec)
    dense = [
        torch.ops.apack.unpack(side, lengths, TOKENS, layout.spec)
        for side, layout in zip(sides, (k, v), strict=True)
    ]
    seen = torch.ops.apack.present(*sides, lengths, TOKENS, k.spec, v.spec)
    assert seen.all() == ("evict" not in name)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, *dense, attn_mask=seen[:, None, None], scale=1.0
    )
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
