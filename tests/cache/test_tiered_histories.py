"""Any history of a cache in tiers: what is known of a token stays with it until it is coded."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from torch import Tensor

from apack_compile.kernels.planes import token_levels
from apack_compile.kernels.running_importance import UNKNOWN

from ..helpers import few
from .histories import pairs
from .test_pooled_histories import SETUPS, Blemish, CodedPair, PooledHistories, blemishes

TIERED = [name for name, (ref, _) in SETUPS.items() if ref.layout.tier_shares]


def importance_of(tokens: Tensor) -> Tensor:
    """Of tokens ``[B, H, T, D]``, so that it can be told from the token: ``[B, T]`` float32."""
    return tokens.nan_to_num(0, 0, 0).float().abs().amax((1, 3))


class TieredHistories(PooledHistories):
    @rule(
        target=pairs,
        setup=st.sampled_from(TIERED),
        pads=st.lists(st.sampled_from([0, 0, 1, 9]), min_size=1, max_size=3),
        count=st.integers(1, 60),
        marks=blemishes,
    )
    def prefill(  # type: ignore[override]
        self, setup: str, pads: list[int], count: int, marks: list[Blemish]
    ) -> CodedPair:
        pair = super().prefill(setup, pads, count, marks, 0.0)
        self.weigh(pair)
        return pair

    @rule(pair=pairs)
    def weigh(self, pair: CodedPair) -> None:
        """Queries that tell the importance of every token of the ring."""
        store = pair.store
        assert store.importance is not None
        if store.length == pair.length:
            ring = store.side.ring[:, :, : store.recent]
            store.importance[:, : store.recent] = importance_of(ring)

    @rule(pair=pairs, tokens=st.integers(1, 16))
    def flush_by_importance(self, pair: CodedPair, tokens: int) -> None:
        """Tokens that leave the ring have bits by what is known of all of them, or by nothing."""
        store = pair.store
        assert store.importance is not None
        if store.length != pair.length or tokens > store.recent:
            return
        start, end = store.coded, store.coded + tokens
        known = store.importance[:, :tokens].clone()
        store.code_oldest(tokens)
        levels = store.side.payload[store.ref.layout.tokenwise - 1][:, start:end, 0]
        first = store.side.pool_positions[:, :1] if store.policy.sinks else torch.zeros(1, 1)
        real = torch.arange(start, end) >= first
        for row, seen in enumerate(real.expand(len(levels), -1)):
            mine = known[row, seen]
            mine = mine if (mine >= 0).all() else torch.zeros_like(mine)
            want = token_levels(mine[None], store.ref.layout.later_steps)[0]
            assert torch.equal(levels[row, seen], want)
            assert not levels[row, ~seen].any()

    @invariant()
    def importance_is_that_of_the_token_or_unknown(self) -> None:
        for pair in self.known[-4:]:
            assert isinstance(pair, CodedPair)
            store = pair.store
            if store.length != pair.length:
                continue
            assert store.importance is not None
            known = store.importance[:, : store.recent]
            told = importance_of(pair.dense[:, :, store.coded :])
            assert torch.equal(torch.where(known == UNKNOWN, UNKNOWN, told), known)


TieredHistories.TestCase.settings = settings(few, stateful_step_count=30)
TestTieredHistories = TieredHistories.TestCase
