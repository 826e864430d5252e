from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apack_compile import ops  # noqa: F401  (registers the operators)
from apack_compile.kernels.importance import OBSERVED

from ..helpers import few


def by_definition(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """The mean of the softmax of the last queries, one row at a time, in float64."""
    batch, heads, queries, _ = q.shape
    length, groups = k.shape[2], heads // k.shape[1]
    last = range(max(queries - OBSERVED, 0), queries)
    out = torch.zeros(batch, length, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in last:
                s = (k[b, h // groups].double() @ q[b, h, t].double()) * scale
                if softcap:
                    s = softcap * torch.tanh(s / softcap)
                if mask is not None:
                    row = mask.expand(batch, heads, queries, length)[b, h, t]
                    s = s.masked_fill(~row, -math.inf) if row.dtype == torch.bool else s + row
                if causal:
                    s = s.masked_fill(torch.arange(length) > t, -math.inf)
                if bool((s == -math.inf).all()) and sinks is None:
                    continue
                if sinks is not None:
                    s = torch.cat([s, sinks[h].double().view(1)])
                out[b] += s.softmax(0)[:length]
    return out / heads / len(last)


@given(
    batch=st.integers(1, 2), kv=st.sampled_from([1, 2]), groups=st.sampled_from([1, 3]),
    queries=st.sampled_from([1, 7, 70]), past=st.sampled_from([0, 5]), pad=st.integers(0, 3),
    kind=st.sampled_from(["none", "bool", "float", "causal"]), capped=st.booleans(),
)  # fmt: skip
@few
def test_it_is_the_mean_weight_of_the_last_queries(
    batch: int, kv: int, groups: int, queries: int, past: int, pad: int, kind: str, capped: bool
) -> None:
    length = queries + past
    q, k = torch.randn(batch, kv * groups, queries, 8) * 2, torch.randn(batch, kv, length, 8)
    mask: Tensor | None = None
    if kind in ("bool", "float"):
        mask = torch.ones(queries, length, dtype=torch.bool).tril(past)[None, None]
        mask = mask & (torch.arange(length) >= pad)
        if kind == "float":
            mask = torch.where(mask, 0.3, -math.inf)
    sinks = torch.randn(kv * groups) if capped else None
    args: tuple[Any, ...] = (q, k, mask, kind == "causal", 0.3, 5.0 if capped else 0.0, sinks)
    got = torch.ops.apack.importance(*args)
    assert got.shape == (batch, length) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), by_definition(*args), rtol=1e-5, atol=1e-7)


def test_sequences_of_a_batch_know_nothing_of_each_other() -> None:
    q, k = torch.randn(3, 4, 20, 8), torch.randn(3, 2, 20, 8)
    together = torch.ops.apack.importance(q, k, None, True, 0.3)
    for row in range(3):
        alone = torch.ops.apack.importance(q[row:][:1], k[row:][:1], None, True, 0.3)
        torch.testing.assert_close(alone[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_that_nobody_may_see_have_none(dtype: torch.dtype) -> None:
    q, k = torch.randn(1, 2, 20, 8, dtype=dtype), torch.randn(1, 2, 20, 8, dtype=dtype)
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    mask[..., :6] = False
    got = torch.ops.apack.importance(q, k, mask, False, 0.3)
    assert not got[0, :6].any()
    assert got[0, 6:].sum() > 0.1


def test_large_scores_in_half_precision_are_numbers() -> None:
    """Bug: q k overflowed before it was scaled, and no token had any importance."""
    q, k = (torch.full((1, 2, 70, 8), 150.0, dtype=torch.float16) for _ in range(2))
    k[:, :, 3] = 151
    got = torch.ops.apack.importance(q, k, None, False, 8**-0.5)
    assert got.isfinite().all() and int(got.argmax()) == 3


def test_where_a_score_is_no_number_no_token_comes_before_another() -> None:
    q, k = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    k[0, 0, 4, 2] = math.nan
    got = torch.ops.apack.importance(q, k, None, False, 0.3)
    assert (got[0] == 1).all() and got[1].isfinite().all() and (got[1] < 1).all()
