from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from apack_compile import ops  # noqa: F401  (registers the operators)

from ..helpers import few

INF = float("inf")


def bias(
    mask: torch.Tensor | None, coded: int, recent: int, capacity: int, ring: int
) -> torch.Tensor:
    lengths = torch.tensor([coded, recent])
    return torch.ops.apack.score_bias(mask, lengths, capacity, ring, torch.float32)


def test_without_a_mask_live_slots_are_0_and_the_others_are_hidden() -> None:
    out = bias(None, 2, 1, 4, 3)
    assert out.tolist() == [[[[0, 0, -INF, -INF, 0, -INF, -INF]]]]


shapes = st.tuples(*[st.sampled_from([1, 2, 3])] * 3)


@given(
    shape=shapes, coded=st.integers(0, 6), recent=st.integers(0, 5), one=st.booleans(),
    dims=st.integers(1, 4), kind=st.sampled_from([torch.bool, torch.float32, torch.float16]),
)  # fmt: skip
@few
def test_masks_are_read_by_logical_position(
    shape: tuple[int, int, int], coded: int, recent: int, one: bool, dims: int, kind: torch.dtype
) -> None:
    tokens = coded + recent
    if not tokens:
        return
    mask = torch.randn(*shape, 1 if one else tokens)[(0,) * (4 - dims)]
    mask = mask > 0 if kind == torch.bool else mask.to(kind)
    out = bias(mask, coded, recent, 8, 6)
    wide = mask.expand(*mask.shape[:-1], tokens)
    seen = torch.where(wide, 0.0, -INF) if kind == torch.bool else wide.float()
    assert torch.equal(out[..., :coded].squeeze(), seen[..., :coded].squeeze())
    assert torch.equal(out[..., 8 : 8 + recent].squeeze(), seen[..., coded:].squeeze())
    assert out.dim() == 4
    assert (out[..., coded:8] == -INF).all()
    assert (out[..., 8 + recent :] == -INF).all()


@pytest.mark.parametrize(
    ("queries", "work"),
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_bias_has_the_working_dtype_of_the_queries(
    queries: torch.dtype, work: torch.dtype, masked: bool
) -> None:
    mask = torch.ones(1, 1, 1, 3, dtype=torch.bfloat16) if masked else None
    out = torch.ops.apack.score_bias(mask, torch.tensor([2, 1]), 4, 3, queries)
    assert out.dtype == work


MASKS = {
    "none": None,
    "bool": torch.ones(2, 1, 3, 5, dtype=torch.bool),
    "float": torch.ones(1, 4, 3, 5),
    "one for all tokens": torch.ones(2, 1, 3, 1, dtype=torch.bool),
    "expanded": torch.ones(2, 1, 1, 5, dtype=torch.bool).expand(2, 4, 3, 5),
    "two dimensions": torch.ones(3, 5),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_schema_fake_and_tracing(mask: torch.Tensor | None) -> None:
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (mask, torch.tensor([3, 2]), 8, 6, torch.float32)
    opcheck(torch.ops.apack.score_bias.default, args, test_utils=checks)
