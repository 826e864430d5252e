"""What a store knows of the attention that the tokens of its ring receive, come what may."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from apack_compile import ops  # noqa: F401  (registers the operators)
from apack_compile.cache import PackedKV, Policy, SideStore
from apack_compile.codec import CodeRef
from apack_compile.kernels.planes import token_levels
from apack_compile.kernels.running_importance import UNKNOWN

from ..helpers import fitted_ref

POLICY = Policy(sinks=2, extra=2, window=8, block=16, chunk=16)
TIERED = fitted_ref(ratio=2, tiers=True)
LEVELS = 2
"""Which payload tensor they are."""


def tokens(count: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 2, count, 8)


def told(count: int = 40, policy: Policy = POLICY) -> SideStore:
    """A store of two sequences that knows the importance of all live tokens of its ring."""
    store = SideStore.encode(tokens(count), TIERED, policy, importance=torch.rand(2, count))
    store.extend(tokens(policy.ring - store.recent))
    assert store.importance is not None
    store.importance.copy_(torch.rand(2, policy.ring))
    return store


def importance_of(store: SideStore) -> Tensor:
    assert store.importance is not None
    return store.importance[:, : store.recent]


def levels_of(store: SideStore, start: int, end: int) -> Tensor:
    return store.side.payload[LEVELS][:, start:end, 0]


def test_a_ring_begins_with_its_shares_of_the_prompts_importance() -> None:
    known = torch.rand(2, 40)
    store = SideStore.encode(tokens(40), TIERED, POLICY, importance=known)
    want = known[:, 32:] / known[:, 32:].sum(1, keepdim=True)
    torch.testing.assert_close(importance_of(store), want)
    assert store.importance is not None and store.importance.shape == (2, POLICY.ring)
    assert (importance_of(SideStore.encode(tokens(40), TIERED, POLICY)) == UNKNOWN).all()


@pytest.mark.parametrize("tokens_", [1, 7, 16])
def test_tokens_that_leave_the_ring_have_bits_by_their_importance(tokens_: int) -> None:
    store = told()
    before = importance_of(store).clone()
    store.code_oldest(tokens_)
    want = token_levels(before[:, :tokens_], TIERED.layout.later_shares)
    assert torch.equal(levels_of(store, 32, 32 + tokens_), want)
    assert torch.equal(importance_of(store), before[:, tokens_:])


def test_where_one_of_them_is_unknown_all_are_served_in_their_order() -> None:
    store = told()
    assert store.importance is not None
    store.importance[1, 3] = UNKNOWN
    before = importance_of(store).clone()
    store.code_oldest(16)
    shares = TIERED.layout.later_shares
    want = token_levels(torch.stack([before[0, :16], torch.zeros(16)]), shares)
    assert torch.equal(levels_of(store, 32, 48), want)


def test_new_tokens_that_no_query_saw_are_unknown() -> None:
    store = told()
    store.code_oldest(16)
    before = importance_of(store).clone()
    store.extend(tokens(3))
    assert torch.equal(importance_of(store)[:, :-3], before)
    assert (importance_of(store)[:, -3:] == UNKNOWN).all()
    store.extend(tokens(40))  # half of these are coded at once
    assert store.coded == 99 - 8 and (importance_of(store) == UNKNOWN).all()


@pytest.mark.parametrize("count", [4, 60])
def test_new_tokens_come_with_what_is_known_of_them(count: int) -> None:
    """Whether they fit into the ring or not; that of a token long seen is averaged."""
    store = told()
    store.code_oldest(16)
    x, known = tokens(count), torch.rand(2, 56 + count)
    store.extend(x, known)
    start = store.coded
    assert start == (48 if count == 4 else 108)
    share = known[:, start:] / known[:, 48:].sum(1, keepdim=True)
    if count == 60:
        torch.testing.assert_close(importance_of(store), share)
        want = token_levels(known[:, 48:108], TIERED.layout.later_shares)
        assert (levels_of(store, 48, 108) == want).float().mean() > 0.9  # a few are averages
    else:
        torch.testing.assert_close(importance_of(store)[:, 8:], share[:, 8:])


def test_padding_in_the_ring_is_of_the_lowest_level_and_takes_no_place() -> None:
    """A sequence has the levels that it has without padding."""
    policy = replace(POLICY, window=20, block=20)
    visible = torch.ones(1, 16, dtype=torch.bool)
    visible[:, :6] = False
    padded = SideStore.encode(tokens(16, 1), TIERED, policy, visible, torch.rand(1, 16))
    bare = SideStore.encode(tokens(10, 1), TIERED, policy, None, torch.rand(1, 10))
    known = torch.rand(1, 10)
    for store, pads in ((padded, 6), (bare, 0)):
        assert store.importance is not None and store.coded == 0
        store.importance[:, pads : pads + 10] = known
        store.importance[:, :pads] = UNKNOWN if pads else 0
        store.code_oldest(pads + 10)
    assert not levels_of(padded, 0, 6).any()
    assert torch.equal(levels_of(padded, 6, 16), levels_of(bare, 0, 10))


COPIES: dict[str, Callable[[SideStore], SideStore]] = {
    "clone": lambda s: s.clone(s.length),
    "pickle": lambda s: pickle.loads(pickle.dumps(s)),
    "select": lambda s: s.select(torch.tensor([0, 1]), s.length),
    "to": lambda s: s.to(s.length, torch.float16, torch.device("cpu")),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_copy_knows_the_same_and_shares_nothing(copy: Callable[[SideStore], SideStore]) -> None:
    store = told()
    made = copy(store)
    assert torch.equal(importance_of(made), importance_of(store))
    assert made.importance is not None and made.importance.dtype == torch.float32
    made.importance.zero_()
    assert importance_of(store).any()


def test_beams_take_their_importance_with_them() -> None:
    store = told()
    chosen = store.select(torch.tensor([1, 1, 0]), store.length)
    assert torch.equal(importance_of(chosen), importance_of(store)[[1, 1, 0]])


@pytest.mark.parametrize("length", [50, 32, 20])
def test_a_crop_keeps_that_of_the_tokens_that_stay(length: int) -> None:
    """In the window, at its end, and into the codes; what comes next has none of theirs."""
    store = told()
    before = importance_of(store).clone()
    assert store.branch(length) is store
    assert torch.equal(importance_of(store), before[:, : max(length - 32, 0)])
    store.extend(tokens(2))
    assert (importance_of(store)[:, -2:] == UNKNOWN).all()


def test_stores_that_are_brought_in_step_and_their_addresses_stay() -> None:
    store = told()
    assert store.importance is not None
    before, where = importance_of(store).clone(), store.importance.data_ptr()
    store.align(40, 100)
    assert torch.equal(importance_of(store), before[:, 8:])
    store.reserve(9)
    assert store.importance.data_ptr() == where


def test_a_ring_of_inference_mode_is_copied_with_what_is_known_of_it() -> None:
    with torch.inference_mode():
        store = told()
    before = importance_of(store).clone()
    store.free_ring()
    assert store.importance is not None and not store.importance.is_inference()
    assert torch.equal(importance_of(store), before)


@pytest.mark.parametrize("ref", [TIERED, fitted_ref(ratio=2)], ids=["tiers", "none"])
def test_a_store_pickled_before_there_was_importance_knows_nothing_of_it(ref: CodeRef) -> None:
    """Bug: it was read, and had no such attribute when it was first used."""
    state = SideStore.encode(tokens(40), ref, POLICY).__getstate__()
    del state["importance"]
    store = SideStore.__new__(SideStore)
    store.__setstate__(state)
    assert (store.importance is None) == (not ref.layout.tier_shares)
    assert store.importance is None or (store.importance == UNKNOWN).all()
    store.extend(tokens(POLICY.ring))
    assert store.nbytes > 0 and store.length == 40 + POLICY.ring


def test_a_write_that_fails_leaves_a_ring_that_is_not_negative() -> None:
    """Bug: more tokens were coded than the store had, and its ring had less than none."""
    store = told()
    alike = store.side.ring[:, :, :1].expand_as(store.side.ring)  # may be read, but not written
    store.side = store.side._replace(ring=alike)
    with pytest.raises(RuntimeError):
        store.extend(tokens(POLICY.ring))
    assert store.recent == POLICY.window


def test_its_bytes_are_counted() -> None:
    store = told()
    assert store.importance is not None
    assert store.nbytes == sum(t.nbytes for t in store.tensors()) + 2 * POLICY.ring * 4


@pytest.mark.parametrize("ref", [fitted_ref(), fitted_ref(evict=0.3)], ids=["plain", "evicting"])
def test_without_tiers_there_is_none(ref: object) -> None:
    handle = PackedKV.pack(tokens(40), ref, POLICY)  # type: ignore[arg-type]
    handle = torch.cat([handle, tokens(60)], 2)
    assert handle.store.importance is None
    assert handle.store.owned() == handle.store.tensors()
