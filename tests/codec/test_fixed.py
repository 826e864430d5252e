from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apack_compile.codec import ExactLayout, TransformLayout
from apack_compile.codec.fixed import BITS, fixed_code, fixed_ref

from ..helpers import few


@given(
    name=st.sampled_from(sorted(BITS)), heads=st.integers(1, 4), dim=st.sampled_from([2, 16, 80]),
    scale=st.sampled_from([0.03, 1.0, 300.0]), seed=st.integers(0, 99),
)  # fmt: skip
@few
def test_errors_are_at_most_a_step_of_the_largest_magnitude(
    name: str, heads: int, dim: int, scale: float, seed: int
) -> None:
    code = fixed_code(name, heads, dim)
    x = scale * torch.randn(2, heads, 5, dim, generator=torch.Generator().manual_seed(seed))
    back = code.layout.decode(code.layout.encode(x, code.params), code.params, x.dtype)
    step = x.abs().amax(-1, keepdim=True) * 2.0 ** (1 - BITS[name])
    # half a step, and what rounding the gain to 16 bits may clip
    assert ((back - x).abs() <= step * (0.5 + 2.0 ** (BITS[name] - 12)) + 1e-6).all()


@pytest.mark.parametrize(("name", "token"), [("int8", 3 * (64 + 2)), ("int4", 3 * (32 + 2))])
def test_bytes_of_a_token(name: str, token: int) -> None:
    assert fixed_code(name, 3, 64).layout.token_bytes(torch.bfloat16) == token


def test_exact_and_odd_heads_are_kept_as_they_are() -> None:
    assert fixed_code("exact", 2, 8).layout == ExactLayout(2, 8)
    assert fixed_code("int4", 2, 3).layout == ExactLayout(2, 3)
    assert isinstance(fixed_code("int8", 2, 3).layout, TransformLayout)


def test_all_caches_share_one_code() -> None:
    assert fixed_ref("int8", 2, 8) is fixed_ref("int8", 2, 8)
    assert fixed_ref("int8", 2, 8) is not fixed_ref("int4", 2, 8)
