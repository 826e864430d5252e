from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from apack_compile.codec import ExactLayout

from ..helpers import few

shapes = {
    "batch": st.integers(1, 3),
    "heads": st.integers(1, 5),
    "tokens": st.integers(0, 7),
    "dim": st.sampled_from([1, 3, 8, 17]),
}


@given(**shapes, dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
@few
def test_tokens_come_back_as_they_were(
    batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype
) -> None:
    x = torch.randn(batch, heads, tokens, dim).to(dtype)
    layout = ExactLayout(heads, dim)
    payload = layout.encode(x, [])
    assert [(p.shape[-1], p.dtype) for p in payload] == list(layout.payload_fields(dtype))
    assert torch.equal(layout.decode(payload, [], dtype), x)


@given(**shapes, repeats=st.integers(1, 3), queries=st.integers(1, 4))
@few
def test_scores_and_mix_are_plain_products(
    batch: int, heads: int, tokens: int, dim: int, repeats: int, queries: int
) -> None:
    x = torch.randn(batch, heads, tokens, dim, dtype=torch.float64)
    layout = ExactLayout(heads, dim)
    payload = layout.encode(x, [])
    wide = x.repeat_interleave(repeats, 1)
    q = torch.randn(batch, heads * repeats, queries, dim, dtype=torch.float64)
    p = torch.rand(batch, heads * repeats, queries, tokens, dtype=torch.float64)
    # float64 rounding of products of at most 17 terms
    close = {"rtol": 0.0, "atol": 1e-12}
    torch.testing.assert_close(layout.scores(q, payload, []), q @ wide.mT, **close)
    torch.testing.assert_close(layout.mix(p, payload, []), p @ wide, **close)


def test_a_token_takes_the_bytes_of_its_numbers() -> None:
    assert ExactLayout(3, 5).token_bytes(torch.bfloat16) == 30
    assert ExactLayout(3, 5).token_bytes(torch.float32) == 60


def test_nothing_is_fitted() -> None:
    assert ExactLayout(2, 4).param_count == 0


def test_not_a_number_stays_where_it_was() -> None:
    x = torch.zeros(1, 2, 3, 4)
    x[0, 1, 2, 3] = float("nan")
    layout = ExactLayout(2, 4)
    back = layout.decode(layout.encode(x, []), [], x.dtype)
    assert torch.equal(back.isnan(), x.isnan())
