"""flex_attention through the whole backend, against itself uncompiled."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.nn.attention.flex_attention as flex
from torch import Tensor, fx, nn

import apack_compile
from apack_compile.cache import PackedKV
from apack_compile.passes.flex_mask import Blocks, FlexMask, write_mask

from ..plain import VOCAB


class FlexDecoder(nn.Module):
    """One block: ALiBi, a softcap, grouped queries, values wider than keys, padding on the left."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 32)
        self.parts = nn.ModuleList(nn.Linear(32, width, bias=False) for width in (32, 16, 24))
        self.head = nn.Linear(48, VOCAB, bias=False)
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.1, 0.0]))

    def forward(self, ids: Tensor, valid: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        batch, new = ids.shape
        first, slopes = valid.shape[1] - new, self.slopes

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return ((i + first >= j) & valid[b, j]) | (i + first == j)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return 2.0 * torch.tanh(s / 2.0) + slopes[h] * (j - i)

        blocks = flex.create_block_mask(
            seen, batch, None, new, valid.shape[1], device="cpu", BLOCK_SIZE=16
        )
        x = self.embed(ids)
        q, k, v = (
            part(x).view(batch, new, heads, -1).transpose(1, 2)
            for part, heads in zip(self.parts, (4, 2, 2), strict=True)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = flex.flex_attention(q, k, v, score, blocks, enable_gqa=True)
        return self.head(y.transpose(1, 2).reshape(batch, new, -1)), (k, v)


def run(model: Any, steps: tuple[int, ...]) -> tuple[list[Tensor], Any]:
    """Logits of a prefill and of steps with so many tokens, and the cache."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (2, sum(steps)), generator=generator)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :5] = False
    logits, past, end = [], None, 0
    for new in steps:
        end += new
        out, past = model(ids[:, end - new : end], valid[:, :end], past)
        logits.append(out)
    return logits, past


def test_flex_attention_is_packed_and_right() -> None:
    model, steps = FlexDecoder().eval(), (50, 1, 1, 3, 1)
    options = {"codec": "exact", "inner": "eager", "window": 8, "block": 16}
    compiled = torch.compile(model, backend="attentionpack", options=options)
    with torch.no_grad(), mock.patch.object(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True):
        wanted, _ = run(model, steps)
        got, past = run(compiled, steps)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert all(isinstance(side, PackedKV) for side in past)
    assert apack_compile.report(model).attends == 4


def test_blocks_are_right_where_sizes_vary_in_compiled_code() -> None:
    """Bug: Inductor's ``floor_divide`` of integers is garbage there, and so were masks."""
    graph = fx.Graph()
    q, counts, listed, keys = (graph.placeholder(name) for name in ("q", "counts", "listed", "k"))
    q.meta["example_value"] = torch.empty(1, 1, 1, 8)
    mask = FlexMask((), None, None, None, Blocks((counts, listed), None, (16, 16)), ())
    graph.output(write_mask(graph, mask, q, keys, lambda node: node))
    made = fx.GraphModule({}, graph)
    count, columns = torch.full((1, 1, 1), 2), torch.tensor([3, 0, 1, 2]).view(1, 1, 1, 4)
    seen = torch.compile(lambda x: made(x, count, columns, torch.arange(x.shape[0])), dynamic=True)(
        torch.zeros(60)
    )
    position = torch.arange(60)
    assert torch.equal(seen[0, 0, 0], (position < 16) | (position >= 48))
