from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apack_compile.cache import Policy
from apack_compile.codec import Code, ExactLayout, TransformLayout
from apack_compile.kernels.encode import encode_tokens
from apack_compile.kernels.reference import unpack_reference

from ..helpers import encoded, few, hand_code, poison

NAN = float("nan")
NOBODY = torch.full((1, 1), -1)
NOTHING_KEPT = Policy(sinks=0, extra=0, window=8, block=16, chunk=16)
POOLED = Policy(sinks=2, extra=2, window=8, block=16, chunk=16)


def unpack(side: list[Tensor], lengths: Tensor, length: int, code: Code) -> Tensor:
    return torch.ops.apack.unpack(side, lengths, length, code.layout.spec)


def transform(gain: int = 0, heads: int = 2, dim: int = 4, groups: int = 1) -> Code:
    return hand_code(TransformLayout(heads, dim, groups, 2, 4, 4, gain))


# below, at and above the window (8), the ring (24) and the chunk (16)
LENGTHS = [1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 100]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("policy", [NOTHING_KEPT, POOLED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_coded_tokens_come_back_as_they_were(
    length: int, policy: Policy, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 3, length, 5).to(dtype)
    code = Code(ExactLayout(3, 5))
    side, lengths = encoded(x, code, policy)
    back = unpack(side, lengths, length, code)
    assert back.dtype == dtype
    assert torch.equal(back, x)


@pytest.mark.parametrize("length", LENGTHS)
def test_storage_has_the_shapes_that_the_policy_says(length: int) -> None:
    code = transform(gain=1)
    tensors = encoded(torch.randn(2, 2, length, 4), code, POOLED)[0][:5]
    capacity = -(-length // 16) * 16
    assert [tuple(t.shape) for t in tensors] == [
        (2, capacity, 5), (2, capacity, 1), (2, 2, 4, 4), (2, 4), (2, 2, 24, 4),
    ]  # fmt: skip
    assert [t.dtype for t in tensors] == [
        torch.uint8, torch.float16, torch.float32, torch.int64, torch.float32,
    ]  # fmt: skip


@given(
    length=st.integers(1, 40), prefix=st.integers(1, 40), gain=st.integers(0, 1),
    groups=st.integers(1, 2), policy=st.sampled_from([NOTHING_KEPT, POOLED]),
)  # fmt: skip
@few
def test_unpacking_reads_every_token_from_where_the_oracle_does(
    length: int, prefix: int, gain: int, groups: int, policy: Policy
) -> None:
    code = transform(gain, 2, 4, groups)
    side, lengths = encoded(torch.randn(2, 2, length, 4).double(), code, policy)
    side = poison(side, lengths, code.layout)
    prefix = min(prefix, length)
    expected = unpack_reference(side, lengths, prefix, code.layout.spec)
    # float64 rounding of sums of 10 products of size up to 1e3
    torch.testing.assert_close(unpack(side, lengths, prefix, code), expected, rtol=0, atol=1e-10)


def test_window_and_sinks_are_exact_and_the_rest_is_coded() -> None:
    code = transform()
    x = torch.randn(2, 2, 40, 4)
    side, lengths = encoded(x, code, POOLED)
    back = unpack(side, lengths, 40, code)
    same = (back == x).all(-1).all(1)
    expected = torch.zeros(2, 40, dtype=torch.bool)
    expected[:, :2] = expected[:, 32:] = True
    assert torch.equal(same, expected)
    coded = code.layout.decode(code.layout.encode(x, code.params), code.params, x.dtype)
    assert torch.equal(back[:, :, 2:32], coded[:, :, 2:32])


def test_sinks_are_the_first_visible_tokens_of_each_row() -> None:
    code = transform()
    x = torch.randn(2, 2, 40, 4)
    visible = torch.ones(2, 40, dtype=torch.bool)
    visible[1, :9] = False
    side, lengths = encoded(x, code, POOLED, visible)
    same = (unpack(side, lengths, 40, code) == x).all(-1).all(1)
    assert same[0, :32].nonzero()[:, 0].tolist() == [0, 1]
    assert same[1, :32].nonzero()[:, 0].tolist() == [9, 10]


@pytest.mark.parametrize("broken", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("token", [0, 5, 31, 32, 39])
def test_tokens_that_are_not_finite_stay_exact(token: int, broken: float) -> None:
    code = transform(gain=1)
    x = torch.randn(2, 2, 40, 4)
    x[0, 1, token, 2] = broken
    side, lengths = encoded(x, code, POOLED)
    back = unpack(side, lengths, 40, code)
    assert torch.equal(back[0, :, token].nan_to_num(7), x[0, :, token].nan_to_num(7))
    others = [t for t in range(40) if t != token]
    assert back[:, :, others].isfinite().all()


def test_more_broken_tokens_than_slots_spoil_their_row_and_no_other() -> None:
    code = transform()
    x = torch.randn(2, 2, 40, 4)
    x[0, 0, 5:8, 1] = NAN
    side, lengths = encoded(x, code, POOLED)
    back = unpack(side, lengths, 40, code)
    assert back[0, :, 6].isnan().all(), "the last that found a slot, in all heads"
    assert torch.equal(back[0, :, :2], x[0, :, :2]), "sinks stay as they are"
    assert back[1].isfinite().all()


def test_broken_padding_takes_no_slot_and_does_not_spread() -> None:
    code = transform()
    x = torch.randn(1, 2, 40, 4)
    x[:, :, :6] = NAN
    visible = torch.arange(40)[None] >= 6
    side, lengths = encoded(x, code, POOLED, visible)
    back = unpack(side, lengths, 40, code)
    assert back.isfinite().all()
    assert torch.equal(back[:, :, 6:8], x[:, :, 6:8])


def test_numbers_that_are_not_finite_are_coded_as_zero() -> None:
    code = transform(gain=1)
    x = torch.randn(1, 2, 6, 4)
    zeroed = x.clone()
    x[0, 0, 3, 1], x[0, 1, 4, 2] = NAN, float("inf")
    zeroed[0, 0, 3, 1] = zeroed[0, 1, 4, 2] = 0
    for mine, theirs in zip(
        encode_tokens(x, code.params, code.layout, NOBODY, 0)[0],
        code.layout.encode(zeroed, code.params),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    exact = ExactLayout(2, 4)
    (mine,), strain = encode_tokens(x, [], exact, NOBODY, 0)
    assert strain is None
    assert torch.equal(mine.isnan(), exact.encode(x, [])[0].isnan())


@pytest.mark.parametrize("heads", [1, 2])
def test_what_encode_returns_shares_nothing_with_its_input(heads: int) -> None:
    x = torch.randn(1, heads, 16, 4)
    code = Code(ExactLayout(heads, 4))
    side, lengths = encoded(x, code, NOTHING_KEPT)
    before = unpack(side, lengths, 16, code)
    x.zero_()
    assert torch.equal(unpack(side, lengths, 16, code), before)
