"""Any history of cache operations gives what the dense tensors give."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from torch import Tensor

from apack_compile.cache import PackedKV, Policy

from ..helpers import few
from .histories import Histories, Pair, pairs

POLICY = Policy(window=8, block=16, chunk=16)


class ExactHistories(Histories):
    def tokens(self, batch: int, count: int) -> Tensor:
        return torch.randn(batch, 2, count, 4, generator=self.generator())

    @rule(target=pairs, batch=st.integers(1, 3), count=st.integers(1, 60))
    def prefill(self, batch: int, count: int) -> Pair:
        x = self.tokens(batch, count)
        return self.keep(Pair(PackedKV.pack(x, policy=POLICY), x))

    @rule(target=pairs, pair=pairs, count=st.integers(1, 200))
    def append(self, pair: Pair, count: int) -> Pair:
        new = self.tokens(pair.dense.shape[0], count)
        return self.keep(pair.each(lambda x: torch.cat([x, new], 2)))

    @rule(target=pairs, pair=pairs, counts=st.lists(st.integers(1, 5), min_size=1, max_size=10))
    def decode(self, pair: Pair, counts: list[int]) -> Pair:
        for count in counts:
            new = self.tokens(pair.dense.shape[0], count)
            pair = pair.each(lambda x, new=new: torch.cat([x, new], -2))
        return self.keep(pair)

    @rule(pair=pairs, value=st.integers(-3, 3))
    def overwrite(self, pair: Pair, value: int) -> None:
        pair.packed.mul_(value)  # a handle of its own; dense tensors may be views of each other
        pair.dense = pair.dense * value

    @invariant()
    def every_handle_has_its_tokens(self) -> None:
        for pair in self.known[-8:]:
            assert pair.packed.shape == pair.dense.shape
            assert torch.equal(pair.packed.unpack(), pair.dense)


ExactHistories.TestCase.settings = settings(few, stateful_step_count=30)
TestHistories = ExactHistories.TestCase
