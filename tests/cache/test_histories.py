"""Any history of cache operations gives what the dense tensors give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from torch import Tensor

from apack_compile.cache import PackedKV, Policy

from ..helpers import few

POLICY = Policy(window=8, block=16, chunk=16)


@dataclass
class Pair:
    """A handle and the dense tensor that it stands for."""

    packed: Tensor
    dense: Tensor

    def each(self, operation: Callable[[Tensor], Tensor]) -> Pair:
        return Pair(operation(self.packed), operation(self.dense))


class Histories(RuleBasedStateMachine):
    pairs = Bundle("pairs")

    def __init__(self) -> None:
        super().__init__()
        self.known: list[Pair] = []
        self.made = 0

    def tokens(self, batch: int, count: int) -> Tensor:
        self.made += 1
        generator = torch.Generator().manual_seed(self.made)
        return torch.randn(batch, 2, count, 4, generator=generator)

    def keep(self, pair: Pair) -> Pair:
        assert isinstance(pair.packed, PackedKV)
        self.known.append(pair)
        return pair

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

    @rule(target=pairs, pair=pairs, data=st.data())
    def crop(self, pair: Pair, data: st.DataObject) -> Pair:
        length = data.draw(st.integers(1, pair.dense.shape[2]))
        return self.keep(pair.each(lambda x: x[..., :length, :]))

    @rule(target=pairs, pair=pairs, data=st.data())
    def reorder(self, pair: Pair, data: st.DataObject) -> Pair:
        row = st.integers(0, pair.dense.shape[0] - 1)
        rows = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=4)))
        return self.keep(pair.each(lambda x: x.index_select(0, rows)))

    @rule(target=pairs, pair=pairs, repeats=st.integers(1, 2))
    def repeat(self, pair: Pair, repeats: int) -> Pair:
        repeats = repeats if pair.dense.shape[0] <= 4 else 1
        return self.keep(pair.each(lambda x: x.repeat_interleave(repeats, dim=0)))

    @rule(target=pairs, pair=pairs, start=st.integers(0, 2), step=st.integers(1, 2))
    def slice_rows(self, pair: Pair, start: int, step: int) -> Pair:
        start = min(start, pair.dense.shape[0] - 1)
        return self.keep(pair.each(lambda x: x[start::step]))

    @rule(target=pairs, pair=pairs, copy_of=st.sampled_from([copy.deepcopy, torch.clone]))
    def duplicate(self, pair: Pair, copy_of: Callable[[Tensor], Tensor]) -> Pair:
        return self.keep(pair.each(copy_of))

    @rule(target=pairs, pair=pairs)
    def share(self, pair: Pair) -> Pair:
        return self.keep(Pair(pair.packed.detach(), pair.dense))

    @rule(pair=pairs, value=st.integers(-3, 3))
    def overwrite(self, pair: Pair, value: int) -> None:
        pair.packed.mul_(value)  # a handle of its own; dense tensors may be views of each other
        pair.dense = pair.dense * value

    @rule(pair=pairs)
    def check_no_more(self, pair: Pair) -> None:
        self.known = [p for p in self.known if p is not pair]

    @invariant()
    def every_handle_has_its_tokens(self) -> None:
        for pair in self.known[-8:]:
            assert pair.packed.shape == pair.dense.shape
            assert torch.equal(pair.packed.unpack(), pair.dense)


Histories.TestCase.settings = settings(few, stateful_step_count=30)
TestHistories = Histories.TestCase
