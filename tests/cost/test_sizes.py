"""Predicted bytes are those of stores: exactly behind prefill, within 5 % while they grow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apack_compile.accounting import cache_bytes
from apack_compile.cache import PackedKV, Policy, SideStore
from apack_compile.codec import CodeRef, LowRankLayout
from apack_compile.codec.fixed import fixed_ref
from apack_compile.codec.lowrank import factor
from apack_compile.cost import PackedSide, bytes_of, side_bytes
from apack_compile.cost.live import predicted_bytes
from apack_compile.cost.sizes import coded_tokens
from apack_compile.cost.symbols import BATCH, LATER, PROMPT

from ..helpers import few, fitted_ref, hand_code, modal_ref

HEADS, DIM = 2, 8
KEYS, VALUES = fitted_ref(gain=False), fitted_ref()
CODES = {
    "exact": fixed_ref("exact", HEADS, DIM),
    "int8": fixed_ref("int8", HEADS, DIM),
    "keys": KEYS,
    "values": VALUES,
    "tiered": fitted_ref(ratio=2, tiers=True),
    "evicting": fitted_ref(gain=False, evict=0.4),
    "evicting tiers": fitted_ref(ratio=2, tiers=True, evict=0.25),
    "keys by kind": modal_ref(gain=False),
    "values by kind": modal_ref(),
    "values by kind in tiers": modal_ref(ratio=3, tiers=True),
    "values by kind in tiers, evicting": modal_ref(ratio=3, tiers=True, evict=0.3),
    "share": CodeRef(hand_code(replace(KEYS.layout, exact=30))),
    "tiered share": CodeRef(hand_code(replace(fitted_ref(ratio=2, tiers=True).layout, exact=51))),
}
DTYPES = [torch.float32, torch.bfloat16]


def dense(batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, HEADS, tokens, DIM).to(dtype)


@pytest.mark.parametrize("name", CODES)
@few
@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 400), sinks=st.integers(0, 5),
    extra=st.integers(0, 8), window=st.integers(0, 70), block=st.sampled_from([16, 24, 32]),
    chunk=st.sampled_from([16, 64]), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_bytes_behind_prefill_are_exact_by_kind(
    name: str, batch: int, tokens: int, sinks: int, extra: int, window: int, block: int,
    chunk: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    ref, policy = CODES[name], Policy(sinks, extra, window, block, chunk)
    handle = PackedKV.pack(dense(batch, tokens, dtype), ref, policy)
    found = cache_bytes(handle)
    want = found.codes, found.gains, found.exact_tokens, found.window
    assert bytes_of(PackedSide.of(ref, policy, dtype), batch, tokens) == want
    assert sum(want) == handle.store.nbytes


@pytest.mark.parametrize("name", [name for name in CODES if "by kind" in name])
@few
@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 400), window=st.integers(0, 70),
    share=st.floats(0, 1), seed=st.integers(0, 9), chunk=st.sampled_from([16, 64]),
)  # fmt: skip
def test_bytes_of_a_mixture_of_kinds_are_exact(
    name: str, batch: int, tokens: int, window: int, share: float, seed: int, chunk: int
) -> None:
    policy = Policy(window=window, chunk=chunk)
    generator = torch.Generator().manual_seed(seed)
    visual = torch.rand(batch, tokens, generator=generator) < share
    store = SideStore.encode(dense(batch, tokens), CODES[name], policy, visual=visual)
    coded = visual[:, : max(tokens - window, 0)]
    counts = int((~coded).sum(1).max()), int(coded.sum(1).max())
    assert store.kinds == counts
    side = PackedSide.of(store.ref, policy, torch.float32, counts)
    assert sum(bytes_of(side, batch, tokens)) == store.nbytes
    assert predicted_bytes([store]) == store.nbytes


@few
@given(batch=st.integers(1, 3), tokens=st.integers(1, 200), rank=st.integers(1, 16))
def test_bases_of_sequences_are_counted(batch: int, tokens: int, rank: int) -> None:
    x = dense(batch, tokens)
    ref = factor(x, LowRankLayout(HEADS, DIM, rank), None, None)
    store = SideStore.encode(x, ref, Policy())
    side = PackedSide.of(ref, Policy(), x.dtype)
    assert side.own == (HEADS * DIM * rank * 2, 0)
    assert sum(bytes_of(side, batch, tokens)) == store.nbytes


def test_parameters_of_all_sequences_are_counted_once() -> None:
    layout = LowRankLayout(HEADS, DIM, 4, rotary=DIM)
    positions = torch.arange(90)[None]
    ref = factor(dense(3, 90), layout, torch.rand(2, DIM), positions)
    store = SideStore.encode(dense(3, 90), ref, Policy())
    side = PackedSide.of(ref, Policy(), torch.float32)
    assert side.own == (HEADS * DIM * 4 * 2, 2 * DIM * 4)
    assert sum(bytes_of(side, 3, 90)) == store.nbytes


def test_a_cache_that_does_not_grow_has_no_recent_tokens() -> None:
    store = SideStore.encode(dense(2, 100), VALUES, Policy().fixed)
    assert (
        sum(bytes_of(PackedSide.of(VALUES, Policy().fixed, torch.float32), 2, 100)) == store.nbytes
    )


@few
@given(
    tokens=st.integers(1, 150), later=st.integers(0, 150), window=st.integers(1, 70),
    block=st.integers(16, 50),
)  # fmt: skip
def test_tokens_leave_the_ring_when_they_do(
    tokens: int, later: int, window: int, block: int
) -> None:
    policy = Policy(window=window, block=block)
    store = SideStore.encode(dense(1, tokens), KEYS, policy)
    decode(store, later)
    assert coded_tokens(policy).subs({PROMPT: tokens, LATER: later}) == store.coded


def decode(store: SideStore, tokens: int) -> None:
    """Append tokens one at a time."""
    batch, heads, _, dim = store.side.ring.shape
    for token in torch.randn(batch, heads, tokens, dim).split(1, 2):
        store.reserve(1)
        store.extend(token)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prompt", [1, 100, 512, 1000])
@pytest.mark.parametrize("name", [*CODES, "svd"])
def test_bytes_stay_within_5_percent_while_the_cache_grows(
    name: str, prompt: int, dtype: torch.dtype
) -> None:
    x = dense(1, prompt, dtype)
    ref = CODES.get(name) or factor(x, LowRankLayout(HEADS, DIM, 4), None, None)
    store = SideStore.encode(x, ref, Policy())
    side = PackedSide.of(ref, Policy(), dtype)
    moved = {store.side.capacity}
    for later in range(32, 1300, 32):
        decode(store, 32)
        moved.add(store.side.capacity)
        assert abs(sum(bytes_of(side, 1, prompt, later)) / store.nbytes - 1) < 0.05
    assert store.length == prompt + 1280 and len(moved) > 5


def test_the_expressions_are_of_batch_and_length_alone() -> None:
    total = side_bytes(PackedSide.of(CODES["tiered share"], Policy(), torch.float32)).total
    assert total.free_symbols == {BATCH, PROMPT, LATER}
    one, two = (total.subs({BATCH: b, PROMPT: 1000, LATER: 0}) for b in (1, 2))
    assert two == 2 * one


def test_bytes_of_a_token_are_those_of_its_layout() -> None:
    """What a chunk more of prompt takes, where nothing is rounded."""
    ref = CODES["tiered"]
    side, chunk = PackedSide.of(ref, Policy(chunk=32), torch.bfloat16), 32 * 32
    less, more = (sum(bytes_of(side, 1, n + 64)) for n in (10 * chunk, 11 * chunk))
    assert more - less == chunk * ref.layout.token_bytes(torch.bfloat16)
