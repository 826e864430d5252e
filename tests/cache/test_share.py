"""Which tokens and how many a share of exact ones is, whatever became of the cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from apack_compile.cache import PackedKV, SideStore
from apack_compile.codec.layout import KEPT_OF, SPARE

from .test_pooled_histories import (
    KEYS,
    NAN,
    POLICY,
    assert_same_tokens,
    broken_tokens,
    kept,
    with_tokens,
)

KEPT = kept(KEYS)


def share(store: SideStore) -> int:
    """Tokens of a row that are to stay exact."""
    return KEPT_OF // 5 * store.coded // KEPT_OF


def on_demand(store: SideStore) -> list[list[int]]:
    """Tokens of each row that have a slot and are not sinks, in order."""
    rows = store.side.pool_positions[:, store.policy.sinks :].tolist()
    return [sorted(position for position in row if position >= 0) for row in rows]


def grown(handle: PackedKV, x: Tensor, step: int = 1) -> PackedKV:
    for part in x.split(step, 2):
        handle = torch.cat([handle, part], 2)
    return handle


def test_a_share_stays_exact_however_tokens_come() -> None:
    """Those with the largest error for their size, and no more than the share of what is coded."""
    x = with_tokens(400, {})
    whole = PackedKV.pack(x, kept(KEYS), POLICY)
    grown = torch.cat([PackedKV.pack(x[:, :, :100], kept(KEYS), POLICY), x[:, :, 100:150]], 2)
    for token in range(150, 400):
        grown = torch.cat([grown, x[:, :, token : token + 1]], 2)
    for handle in (whole, grown):
        positions = handle.store.side.pool_positions[0, POLICY.sinks :]
        coded = handle.store.coded
        used = positions[positions >= 0]
        assert len(used) == KEPT_OF // 5 * coded // KEPT_OF
        assert_same_tokens(handle.unpack()[:, :, used], x[:, :, used], 0)
    coded, taken = whole.store.coded, whole.store.side.pool_positions[0]
    assert len(taken) == POLICY.sinks + SPARE + KEPT_OF // 5 * coded // KEPT_OF
    layout, params = whole.store.ref.layout, whole.store.ref.code.params
    _, judged = layout.encode_and_judge(x, params)
    mean = x.transpose(1, 2).flatten(2) - params[0].double()
    worst = (judged.error / mean.square().sum(-1))[0, POLICY.sinks : coded].argsort(descending=True)
    wanted = set((worst[: (taken >= 0).sum() - POLICY.sinks] + POLICY.sinks).tolist())
    assert set(taken[POLICY.sinks :].tolist()) == wanted | {-1}


def test_a_crop_does_not_leave_its_slots_to_the_next_tokens() -> None:
    """Bug: tokens behind a crop took all the slots that it had freed."""
    x = with_tokens(400, {})
    handle = PackedKV.pack(x, KEPT, POLICY)[:, :, :40]
    torch.cat([handle, x[:, :, :1]], 2)  # nobody has the longer one: the store is cut
    capacity = handle.store.side.payload[0].shape[1]
    slots = POLICY.sinks + SPARE + KEPT_OF // 5 * capacity // KEPT_OF
    for count in (30, 30, 60):
        left = len(on_demand(handle.store)[0])
        handle = grown(handle, x[:, :, 200 : 200 + count])
        assert len(on_demand(handle.store)[0]) == max(left, share(handle.store))
        assert handle.store.side.pool.shape[2] == slots
    assert len(on_demand(handle.store)[0]) == share(handle.store) == 28 < slots // 2


@pytest.mark.parametrize("how", ["clone", "select"])
def test_a_copy_of_a_crop_has_no_slots_of_tokens_that_are_gone(how: str) -> None:
    """Bug: copies had all the slots of the longer cache."""
    x = torch.cat([with_tokens(400, {}), with_tokens(400, {})])
    x[:, :, :20] *= 1e-3  # for their size, the code holds these worst
    whole = PackedKV.pack(x, KEPT, POLICY)
    for length, at_least in ((30, 18), (301, 0)):
        crop = whole[:, :, :length]
        rows = torch.arange(2)
        copy = crop.clone() if how == "clone" else crop.index_select(0, rows)
        used = max(map(len, on_demand(copy.store)))
        wanted = KEPT_OF // 5 * (-(-length // POLICY.chunk) * POLICY.chunk) // KEPT_OF
        assert copy.store.side.pool.shape[2] == POLICY.sinks + max(used, wanted) + SPARE
        assert copy.store.side.pool.shape[2] < whole.store.side.pool.shape[2] and used >= at_least
        assert torch.equal(copy.unpack(), crop.unpack())
        assert copy.store.side.pool_positions[:, :2].tolist() == [[0, 1]] * 2


def test_beams_keep_the_slack_of_the_pool() -> None:
    handle = grown(PackedKV.pack(with_tokens(60, {}), KEPT, POLICY), with_tokens(17, {}))
    store = handle.store.select(torch.tensor([0, 0]), handle.shape[2])
    assert store.side.pool.shape[2] == handle.store.side.pool.shape[2]


def test_tokens_of_the_window_take_no_slots() -> None:
    """Bug: a prefill gave slots to tokens that are exact in the ring; most to rows of padding."""
    x = torch.cat([with_tokens(200, {}), with_tokens(200, {})])
    x[:, :, 192:] *= 90.0
    visible = torch.arange(200) >= torch.tensor([[150], [0]])
    store = SideStore.encode(x, KEPT, POLICY, visible)
    padded, full = on_demand(store)
    assert len(padded) == len(full) == share(store) == 38
    assert padded[0] >= 152 and padded[-1] < 192
    assert full[-1] < 192


def test_padding_of_a_short_prompt_takes_no_slots() -> None:
    """Bug: padding that was coded out of the ring took slots for good, and was tallied."""
    x = torch.cat([with_tokens(8, {}), with_tokens(8, {})])
    x[0, :, :5] = 9.0
    visible = torch.arange(8) >= torch.tensor([[5], [0]])
    handle = grown(PackedKV.pack(x, KEPT, POLICY, visible), x.new_ones(2, 2, 40, 8).normal_())
    store = handle.store
    assert store.coded == 34 and share(store) == 6
    assert [len(row) for row in on_demand(store)] == [6, 6]
    assert on_demand(store)[0][0] >= 7
    assert store.tally[2] == (34 - 5 - 2 - 6) + (34 - 2 - 6)


@pytest.mark.parametrize("step", [1, 16, 60])
def test_four_broken_tokens_stay_exact_behind_a_share_that_is_taken(step: int) -> None:
    """As the README says."""
    handle = PackedKV.pack(with_tokens(200, {}), KEPT, POLICY)
    later = with_tokens(60, dict.fromkeys([3, 4, 20, 40], NAN))
    handle = grown(handle, later, step)
    assert broken_tokens(handle) == [203, 204, 220, 240]
    assert_same_tokens(handle.unpack()[:, 1, broken_tokens(handle)], later[:, 1, [3, 4, 20, 40]], 0)


def test_the_pool_grows_when_the_payload_does() -> None:
    """Bug: it grew by what was wanted, so that every flush had captured graphs made anew."""
    handle = PackedKV.pack(with_tokens(1000, {}), KEPT, replace(POLICY, chunk=64))
    store, moves = handle.store, []
    for _ in range(20):
        before = (store.side.payload[0].data_ptr(), store.side.pool.data_ptr())
        store.extend(with_tokens(16, {}))
        after = (store.side.payload[0].data_ptr(), store.side.pool.data_ptr())
        moves.append(tuple(a != b for a, b in zip(before, after, strict=True)))
        capacity = store.side.capacity
        assert len(on_demand(store)[0]) == share(store)
    assert moves.count((True, True)) == 3
    assert moves.count((False, True)) == 1  # the first: a prefill makes it without slack
    assert capacity


def test_no_rows_of_a_crop() -> None:
    """Bug: the largest count of slots was asked of no rows."""
    whole = PackedKV.pack(with_tokens(200, {}), kept(KEYS), POLICY)
    none = whole[:, :, :80].index_select(0, torch.empty(0, dtype=torch.int64))
    assert none.shape == (0, *whole.shape[1:2], 80, whole.shape[3])
    assert none.unpack().shape == none.shape
