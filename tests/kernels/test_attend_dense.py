"""Dense attention with dropped tokens against the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apack_compile import ops  # noqa: F401  (registers the operators)
from apack_compile.kernels.reference import attend_reference

from ..helpers import few


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"sinks": True}])
@given(
    batch=st.integers(1, 2), groups=st.integers(1, 3), queries=st.integers(1, 5),
    past=st.integers(1, 9), new=st.integers(0, 5),
)  # fmt: skip
@few
def test_hidden_tokens_are_as_if_the_mask_hid_them(
    kind: str, causal: bool, more: dict[str, Any], batch: int, groups: int, queries: int,
    past: int, new: int,
) -> None:  # fmt: skip
    length = past + new
    q = torch.randn(batch, 2 * groups, queries, 4, dtype=torch.float64)
    k, v = (torch.randn(batch, 2, length, d, dtype=torch.float64) for d in (4, 3))
    there = torch.rand(batch, past) < 0.6
    there[:, 0] = True
    seen = torch.ones(batch, 1, queries, length, dtype=torch.bool)
    seen[:, :, :, :past] = there[:, None, None]
    if causal:
        seen = seen & torch.ones(queries, length, dtype=torch.bool).tril()
    mask, whole = None, torch.zeros(()).double().expand(batch, 1, queries, length)
    if kind == "bool":
        mask = torch.rand(batch, 1, queries, length) < 0.8
        mask[..., 0] = True
        seen = seen & mask
    elif kind == "float":
        mask = torch.randn(batch, 1, queries, length, dtype=torch.float64)
        whole = mask
    whole = whole.masked_fill(~seen, float("-inf"))
    sinks = torch.randn(2 * groups, dtype=torch.float64) if "sinks" in more else None
    softcap = more.get("softcap", 0.0)
    got = torch.ops.apack.attend_dense(q, k, v, mask, there, causal, 0.5, softcap, sinks)
    want = attend_reference(q, k, v, whole, 0.5, softcap, sinks)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
