from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apack_compile.cache import PackedKV, Policy

from ..helpers import fitted_ref

POLICY = Policy(sinks=2, extra=2, window=8, block=16, chunk=16)
ROWS = torch.tensor([2, 0, 0, 1])

Op = Callable[[Any], Any]


def pack(x: Tensor, kind: str) -> PackedKV:
    return PackedKV.pack(x, None if kind == "exact" else fitted_ref(), POLICY)


def dense(length: int = 40) -> Tensor:
    return torch.randn(3, 2, length, 8)


STAYS_PACKED: dict[str, Op] = {
    "alias": lambda x: torch.ops.aten.alias(x),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "crop": lambda x: x[:, :, :13],
    "crop from behind": lambda x: x[..., :-5, :],
    "crop beyond the end": lambda x: x[:, :, :99],
    "detach": lambda x: x.detach(),
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "to dtype": lambda x: x.to(torch.bfloat16),
    "to device": lambda x: x.to("cpu", copy=True),
    "index with a list": lambda x: x[[2, 0, 0]],
    "index with a mask": lambda x: x[torch.tensor([True, False, True])],
    "index with negative numbers": lambda x: x[torch.tensor([-1, 0, -3])],
    "index with rows and full slices": lambda x: x[ROWS, :],
    "index_select": lambda x: x.index_select(0, ROWS),
    "index_select, dim from behind": lambda x: x.index_select(-4, ROWS),
    "narrow length": lambda x: x.narrow(2, 0, 11),
    "narrow batch": lambda x: x.narrow(0, 1, 2),
    "repeat": lambda x: x.repeat(2, 1, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=0),
    "repeat_interleave, function": lambda x: torch.repeat_interleave(x, 3, dim=0),
    "repeat_interleave, dim from behind": lambda x: x.repeat_interleave(2, -4),
    "repeat_interleave by a tensor": lambda x: x.repeat_interleave(torch.tensor([1, 2, 0]), dim=0),
    "slice of rows": lambda x: x[1:],
    "slice of rows in steps": lambda x: x[::2],
    "slice of everything": lambda x: x[:],
}

MANY: dict[str, Op] = {
    "chunk": lambda x: x.chunk(2),
    "split": lambda x: x.split(2),
    "split, sizes": lambda x: x.split([1, 2]),
    "tensor_split": lambda x: x.tensor_split(3),
}

GIVES_DENSE: dict[str, Op] = {
    "add": lambda x: x + 1,
    "cat of the batch": lambda x: torch.cat([x, x], 0),
    "cat of two packed": lambda x: torch.cat([x, x], 2),
    "cat in front": lambda x: torch.cat([torch.ones(3, 2, 1, 8), x], 2),
    "cat of another dtype": lambda x: torch.cat([x, torch.ones(3, 2, 1, 8).double()], 2),
    "channels": lambda x: x[..., :4],
    "chunk of heads": lambda x: torch.stack(x.chunk(2, 1)),
    "comparison": lambda x: x > 0,
    "expand": lambda x: x[:1].expand(5, -1, -1, -1),
    "flatten": lambda x: x.flatten(1),
    "flip of length": lambda x: x.flip(2),
    "index of heads": lambda x: x[:, torch.tensor([1, 0])],
    "index_select of length": lambda x: x.index_select(2, torch.tensor([5, 30])),
    "integer": lambda x: x.int(),
    "last tokens": lambda x: x[:, :, -4:],
    "matmul": lambda x: x @ torch.ones(8, 3),
    "no tokens": lambda x: x[:, :, :0],
    "one row": lambda x: x[1],
    "every second token": lambda x: x[:, :, ::2],
    "repeat of heads": lambda x: x.repeat(1, 2, 1, 1),
    "repeat_interleave of heads": lambda x: x.repeat_interleave(2, dim=1),
    "repeat_interleave of all": lambda x: x.repeat_interleave(2),
    "transpose": lambda x: x.transpose(1, 2),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "zeros_like": lambda x: torch.zeros_like(x),
}

every_code = pytest.mark.parametrize("kind", ["exact", "transform"])


def values(x: Any) -> Tensor:
    return x.unpack() if isinstance(x, PackedKV) else x


def assert_same(mine: Any, theirs: Tensor) -> None:
    assert (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device)
    assert torch.equal(values(mine), theirs)


@every_code
@pytest.mark.parametrize("op", STAYS_PACKED.values(), ids=STAYS_PACKED)
def test_cache_operations_stay_packed(op: Op, kind: str) -> None:
    x = pack(dense(), kind)
    result = op(x)
    assert isinstance(result, PackedKV)
    expected = op(x.unpack())
    if kind == "transform" and expected.dtype != x.dtype:
        # exact tokens are cast, coded ones decoded to the new dtype: one rounding to the lesser
        # of the two dtypes apart
        close = 1e-6 if expected.dtype == torch.float64 else torch.finfo(expected.dtype).eps
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result.unpack(), expected, rtol=close, atol=close)
    else:
        assert_same(result, expected)


@every_code
@pytest.mark.parametrize("op", MANY.values(), ids=MANY)
def test_splitting_the_batch_stays_packed(op: Op, kind: str) -> None:
    x = pack(dense(), kind)
    parts, expected = op(x), op(x.unpack())
    assert len(parts) == len(expected)
    for part, whole in zip(parts, expected, strict=True):
        assert isinstance(part, PackedKV)
        assert_same(part, whole)


@every_code
@pytest.mark.parametrize("op", GIVES_DENSE.values(), ids=GIVES_DENSE)
def test_other_operations_get_the_dense_tensor(op: Op, kind: str) -> None:
    x = pack(dense(), kind)
    result = op(x)
    assert not isinstance(result, PackedKV)
    assert_same(result, op(x.unpack()))


@every_code
@pytest.mark.parametrize("dim", [2, -2])
@pytest.mark.parametrize("count", [0, 1, 16, 50])
def test_cat_behind_a_handle_appends(kind: str, dim: int, count: int) -> None:
    x, new = pack(dense(), kind), dense(count)
    before = x.unpack()
    grown = torch.cat([x, new], dim)
    assert isinstance(grown, PackedKV)
    assert grown.shape == (3, 2, 40 + count, 8)
    expected = torch.cat([before, new], dim)
    exact = slice(None) if kind == "exact" else slice(grown.store.coded, None)
    assert torch.equal(grown.unpack()[:, :, exact], expected[:, :, exact])


def test_cat_skips_empty_placeholders_and_takes_several_tensors() -> None:
    x, a, b = dense(), dense(3), dense(30)
    grown = torch.cat([torch.tensor([]), pack(x, "exact"), a, b], -2)
    assert isinstance(grown, PackedKV)
    assert torch.equal(grown.unpack(), torch.cat([x, a, b], 2))


@pytest.mark.parametrize(
    "shape", [(1, 2, 1, 8), (3, 1, 1, 8), (3, 2, 1, 1), (3, 2, 1, 4), (2, 1, 8)]
)
def test_cat_of_other_shapes_is_refused_as_by_torch(shape: tuple[int, ...]) -> None:
    """Bug: sizes of 1 were broadcast."""
    x = pack(dense(), "exact")
    with pytest.raises(RuntimeError):
        torch.cat([x, torch.ones(shape)], 2)
    assert x.shape == (3, 2, 40, 8)


def test_cat_of_one_handle_is_another_tensor() -> None:
    """Bug: the result was the handle itself, and writing to it wrote to both."""
    x = dense()
    handle = pack(x, "exact")
    torch.cat([handle], 2).zero_()
    assert torch.equal(handle.unpack(), x)


IN_PLACE: dict[str, Op] = {
    "add_": lambda x: x.add_(1),
    "copy_": lambda x: x.copy_(torch.ones(3, 2, 40, 8)),
    "index_copy_": lambda x: x.index_copy_(2, torch.tensor([3, 39]), torch.ones(3, 2, 2, 8)),
    "masked_fill_": lambda x: x.masked_fill_(x > 0, 5.0),
    "out": lambda x: torch.mul(x, 2, out=x),
    "zero_": lambda x: x.zero_(),
}


@every_code
@pytest.mark.parametrize("op", IN_PLACE.values(), ids=IN_PLACE)
def test_in_place_operations_take_over_exactly(op: Op, kind: str) -> None:
    x = pack(dense(), kind)
    other = x.detach()
    before = x.unpack()
    expected = before.clone()
    op(expected)
    result = op(x)
    assert result is x
    assert isinstance(x, PackedKV)
    assert torch.equal(x.unpack(), expected)
    assert torch.equal(other.unpack(), before)  # a handle of its own
    assert torch.equal(torch.cat([x, expected], 2).unpack(), torch.cat([expected, expected], 2))


@every_code
@pytest.mark.parametrize(
    "index", [(slice(None), 1, 3), (0,), (..., slice(2, 5), slice(None))], ids=str
)
def test_writing_through_an_index_takes_over(kind: str, index: tuple[Any, ...]) -> None:
    """Bug: the write went to a dense tensor that nobody kept."""
    x = pack(dense(), kind)
    expected = x.unpack()
    expected[index] = 7.0
    x[index] = 7.0
    assert torch.equal(x.unpack(), expected)


def test_a_handle_written_into_a_dense_tensor() -> None:
    x = dense()
    target = torch.zeros(3, 2, 50, 8)
    target[:, :, :40] = pack(x, "exact")
    assert torch.equal(target[:, :, :40], x)


def test_a_row_that_does_not_exist_is_refused() -> None:
    x = pack(dense(), "exact")
    for rows in (torch.tensor([3]), torch.tensor([-4])):
        with pytest.raises((IndexError, RuntimeError)):
            x[rows]
