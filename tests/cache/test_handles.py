from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from apack_compile.cache import PackedKV, Policy

from ..helpers import fitted_ref

POLICY = Policy(sinks=2, extra=2, window=8, block=16, chunk=16)


def dense(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 2, length, 8)


def pack(x: Tensor) -> PackedKV:
    return PackedKV.pack(x, policy=POLICY)


def cat(*parts: Tensor) -> Tensor:
    return torch.cat(parts, 2)


def through(handle: PackedKV) -> dict[str, Callable[[], PackedKV]]:
    def saved() -> PackedKV:
        buffer = io.BytesIO()
        torch.save({"keys": handle}, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)["keys"]

    return {
        "copy": lambda: copy.copy(handle),
        "deepcopy": lambda: copy.deepcopy(handle),
        "pickle": lambda: pickle.loads(pickle.dumps(handle)),
        "torch.save": saved,
        "clone": lambda: handle.clone(),
    }


def test_a_handle_looks_like_the_dense_tensor() -> None:
    x = dense(40).bfloat16()
    handle = pack(x)
    assert isinstance(handle, Tensor)
    assert (handle.shape, handle.dtype, handle.device) == (x.shape, x.dtype, x.device)
    assert handle.is_contiguous()
    assert not handle.requires_grad
    assert handle.dense_bytes == x.nbytes
    assert handle.packed_bytes == handle.store.nbytes
    assert "PackedKV((2, 2, 40, 8), torch.bfloat16, exact:heads=2,dim=8, 32 coded" in repr(handle)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 40, 8), r"shape \(2, 40, 8\)"),
        ((2, 4, 40, 8), "4 heads of 8; its code is for 2 heads of 8"),
    ],
)
def test_what_is_no_cache_tensor_of_the_code_is_refused(
    shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PackedKV.pack(torch.ones(shape), fitted_ref(2, 8), POLICY)


@pytest.mark.parametrize("kind", ["copy", "deepcopy", "pickle", "torch.save", "clone"])
@pytest.mark.parametrize("ref", [None, fitted_ref()], ids=["exact", "transform"])
def test_a_copy_has_the_same_tokens_and_a_life_of_its_own(kind: str, ref: object) -> None:
    handle = PackedKV.pack(dense(100), ref, POLICY)
    before = handle.unpack()
    twin = through(handle[:, :, :50])[kind]()
    assert isinstance(twin, PackedKV)
    assert twin.store is not handle.store
    assert twin.store.side.capacity < handle.store.side.capacity  # no more than it needs
    assert torch.equal(twin.unpack(), before[:, :, :50])
    twin.zero_()
    assert torch.equal(handle.unpack(), before)


def test_deepcopy_keeps_one_tensor_one_tensor() -> None:
    handle = pack(dense(20))
    a, b = copy.deepcopy([handle, handle])
    assert a is b
    assert copy.deepcopy(handle).store.ref is handle.store.ref


@pytest.mark.parametrize("count", [1, 20, 100])
def test_an_older_handle_stays_valid_after_append(count: int) -> None:
    x, new = dense(40), dense(count)
    old = pack(x)
    grown = cat(old, new)
    assert torch.equal(old.unpack(), x)
    assert torch.equal(grown.unpack(), cat(x, new))
    assert grown.store is old.store


@pytest.mark.parametrize("length", [1, 20, 33, 39])
def test_an_older_handle_stays_valid_after_crop_and_append(length: int) -> None:
    x, new = dense(40), dense(30)
    old = pack(x)
    other = cat(old[:, :, :length], new)
    assert other.store is not old.store
    assert torch.equal(old.unpack(), x)
    assert torch.equal(other.unpack(), cat(x[:, :, :length], new))


@pytest.mark.parametrize("counts", [(1, 1), (3, 40), (40, 3), (100, 100)])
def test_two_continuations_of_one_prefix_share_it_until_they_part(counts: tuple[int, int]) -> None:
    x, a, b = dense(40), dense(counts[0]), dense(counts[1])
    prefix = pack(x)
    twin = prefix.detach()
    assert twin.store is prefix.store
    first = cat(prefix, a)
    assert first.store is prefix.store
    second = cat(twin, b)
    assert second.store is not prefix.store
    for more in range(3):
        extra = dense(7)
        a, b = cat(a, extra), cat(b, extra + more)
        first, second = cat(first, extra), cat(second, extra + more)
    assert torch.equal(first.unpack(), cat(x, a))
    assert torch.equal(second.unpack(), cat(x, b))
    assert torch.equal(prefix.unpack(), x)


def test_a_continuation_that_nobody_holds_leaves_its_room_to_the_next() -> None:
    x, new = dense(40), dense(5)
    prefix = pack(x)
    for _ in range(4):
        gone = cat(prefix, dense(5))
        assert gone.store is prefix.store
        del gone
    last = cat(prefix, new)
    assert last.store is prefix.store
    assert torch.equal(last.unpack(), cat(x, new))


@pytest.mark.parametrize("ref", [None, fitted_ref()], ids=["exact", "transform"])
@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_crop_and_append_by_the_only_handle_copies_nothing(ref: object, grad: type) -> None:
    with grad():
        handle = PackedKV.pack(dense(100), ref, POLICY)
        store = handle.store
        pointers = [t.data_ptr() for t in store.tensors()]
        for length in (99, 95, 60):
            handle = handle[..., :length, :]
            handle = cat(handle, dense(3))
            assert handle.store is store
        assert [t.data_ptr() for t in store.tensors()] == pointers
        assert handle.shape[2] == 63


def test_storage_dies_with_its_last_handle() -> None:
    import weakref

    handle = pack(dense(40))
    cropped, alive = handle[:, :, :5], weakref.ref(handle.store)
    del handle
    gc.collect()
    assert alive() is not None
    del cropped
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("count", [1, 20, 100])
@pytest.mark.parametrize("ref", [None, fitted_ref()], ids=["exact", "transform"])
def test_a_cache_made_in_inference_mode_grows_outside_of_it(count: int, ref: object) -> None:
    """Bug: ``append`` wrote in place to inference tensors."""
    with torch.inference_mode():
        handle = PackedKV.pack(dense(40), ref, POLICY)
    new = dense(count)
    grown = cat(handle, new).append(new).append(new[:, :, :1])
    grown.store.reserve(16)
    recent = grown.store.recent
    expected = cat(new, new, new[:, :, :1])[:, :, -recent:]
    assert torch.equal(grown.unpack()[:, :, -expected.shape[2] :], expected)


def test_a_cache_that_grew_in_inference_mode_grows_outside_of_it() -> None:
    x, new = dense(40), dense(100)
    handle = pack(x)
    with torch.inference_mode():
        handle = handle.append(new)
    handle = handle.append(new)
    assert torch.equal(handle.unpack(), cat(x, new, new))


def test_hidden_tokens_are_no_sinks() -> None:
    x = dense(60, batch=1)
    visible = torch.arange(60)[None] >= 10
    handle = PackedKV.pack(x, fitted_ref(), POLICY, visible)
    exact = (handle.unpack() == x).all(-1).all(1)[0]
    assert exact[:52].nonzero()[:, 0].tolist() == [10, 11]


def test_a_token_that_is_not_a_number_does_not_outlive_a_crop() -> None:
    x = dense(60)
    x[0, 0, 40] = float("nan")
    for ref in (None, fitted_ref()):
        handle = PackedKV.pack(x, ref, POLICY)
        grown = cat(handle[:, :, :30], dense(40))
        assert grown.unpack().isfinite().all()
