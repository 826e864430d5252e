"""What the state machines of this folder share: operations that treat all tokens alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule
from torch import Tensor

from apack_compile.cache import PackedKV

pairs = Bundle("pairs")

AnyPair = TypeVar("AnyPair", bound="Pair")


@dataclass
class Pair:
    """A handle and the dense tensor that it stands for.

    Whatever else is known of the tokens may come as further tensors ``[B, ., S, .]``.
    """

    packed: Tensor
    dense: Tensor

    def each(self: AnyPair, operation: Callable[[Tensor], Tensor]) -> AnyPair:
        return type(self)(*(operation(getattr(self, f.name)) for f in fields(self)))


class Histories(RuleBasedStateMachine):
    """Crop, select, copy and share; how pairs begin and grow is the subclass's own."""

    def __init__(self) -> None:
        super().__init__()
        self.known: list[Pair] = []
        self.made = 0

    def generator(self) -> torch.Generator:
        """Another one for each run of tokens, the same ones in each example."""
        self.made += 1
        return torch.Generator().manual_seed(self.made)

    def keep(self, pair: AnyPair) -> AnyPair:
        assert isinstance(pair.packed, PackedKV)
        self.known.append(pair)
        return pair

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
        return self.keep(pair.each(Tensor.detach))

    @rule(pair=pairs)
    def check_no_more(self, pair: Pair) -> None:
        self.known = [p for p in self.known if p is not pair]
