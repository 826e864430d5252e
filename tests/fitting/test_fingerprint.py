from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from apack_compile.fitting.fingerprint import digests, fingerprint

from ..helpers import few

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8]


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 20).to(dtype)


def digest(w: Tensor) -> str:
    (one,) = digests([w])
    return one


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_digest_is_a_matter_of_content(dtype: torch.dtype) -> None:
    w = weight((6, 10), dtype)
    assert re.fullmatch(r"[0-9a-f]{32}", digest(w))
    assert digest(w) == digest(w.clone()) == digest(nn.Parameter(w, requires_grad=False))
    assert digest(w) == digest(w.T.contiguous().T), "strides are no content"
    assert digest(w) != digest(weight((6, 10), dtype, seed=1))


@few
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), bit=st.integers(0, 31), data=st.data())
def test_any_changed_bit_changes_the_digest(
    rows: int, columns: int, bit: int, data: st.DataObject
) -> None:
    """Sums see one changed number wherever it is, sampled or not."""
    w = weight((rows, columns))
    changed = w.clone()
    bits = changed.view(torch.int32)
    place = data.draw(st.tuples(st.integers(0, rows - 1), st.integers(0, columns - 1)))
    bits[place] ^= torch.tensor(-(2**31) if bit == 31 else 1 << bit, dtype=torch.int32)
    assert digest(changed) != digest(w)


def test_exchanged_rows_change_the_digest_even_between_the_samples() -> None:
    w = weight((4096, 8))  # every 64th pair of numbers is sampled: rows 0, 16, 32, ...
    swapped = w.clone()
    swapped[[3, 5]] = w[[5, 3]]
    assert digest(swapped) != digest(w)


def test_shape_and_dtype_are_content() -> None:
    w = torch.zeros(4, 6)
    every = [w, w.view(6, 4), w.flatten(), w.double(), w.half(), w.int(), torch.zeros(4, 7)]
    assert len(set(digests(every))) == len(every)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (5,), (2, 3, 4)], ids=str)
def test_any_shape_has_a_digest(shape: tuple[int, ...]) -> None:
    assert digest(weight(shape)) == digest(weight(shape).clone())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_a_weight_lies_in_its_storage_makes_no_difference(dtype: torch.dtype) -> None:
    w = weight((6, 16), dtype)
    for offset in range(1, 9):
        room = torch.zeros(6 * 16 + 8, dtype=dtype)
        moved = room[offset : offset + 6 * 16].view(6, 16)
        moved.copy_(w)
        assert digest(moved) == digest(w)


def test_several_weights_are_read_in_their_order() -> None:
    a, b = weight((3, 4)), weight((5,))
    assert digests([a, b]) == [digest(a), digest(b)]
    assert digests([]) == []


def test_the_fingerprint_does_not_depend_on_the_order_or_on_repetition() -> None:
    names = digests([weight((3, i)) for i in range(1, 5)])
    assert fingerprint(names) == fingerprint([*names[::-1], names[0]])
    assert fingerprint(names) != fingerprint(names[1:])


def test_a_tensor_that_does_not_show_its_bits_is_refused() -> None:
    class Quantised(Tensor):
        pass

    with pytest.raises(RuntimeError, match="a weight is a Quantised"):
        digests([torch.zeros(3).as_subclass(Quantised)])
