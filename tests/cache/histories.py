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

from apack_compile import ops  # noqa: F401  (registers the operators)
from apack_compile.cache import PackedKV, SideStore

from ..helpers import dropped_tokens

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


def store_of(pair: Pair) -> SideStore:
    """Where the tokens of a pair are kept."""
    assert isinstance(pair.packed, PackedKV) and pair.packed.store is not None
    return pair.packed.store


class Histories(RuleBasedStateMachine):
    """Operations that treat all tokens alike; how pairs begin and grow is the subclass's own."""

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
    def move(self, pair: Pair) -> Pair:
        return self.keep(pair.each(lambda x: x.to(x.dtype, copy=True)))

    @rule(pair=pairs)
    def flush(self, pair: Pair) -> None:
        """Code what is behind the window; it is the same cache."""
        store = store_of(pair)
        surplus = store.recent - store.policy.window
        if store.length == pair.dense.shape[2] and surplus > 0:
            store.code_oldest(surplus)

    @rule(pair=pairs)
    def read_eagerly(self, pair: Pair) -> None:
        """Operators that know nothing of packed tensors see the dense one."""
        right = pair.packed.unpack()  # type: ignore[attr-defined]
        for operation in (Tensor.exp, lambda x: x.transpose(1, 2)[:, -1:] + 1):
            got = operation(pair.packed)
            assert not isinstance(got, PackedKV)
            torch.testing.assert_close(got, operation(right), rtol=0, atol=0, equal_nan=True)

    @rule(pair=pairs, queries=st.integers(1, 3))
    def attend(self, pair: Pair, queries: int) -> None:
        """Packed attention gives what attention to the dense tensor gives; dropped ones hidden."""
        store, dense = store_of(pair), pair.packed.unpack()  # type: ignore[attr-defined]
        layout, length = store.ref.layout, dense.shape[2]
        if not dense.isfinite().all() or getattr(layout, "positional", False):
            return
        coded = min(store.coded, length)
        side = [*store.tensors(), *store.ref.code.params]
        generator = self.generator()
        shape = dense.shape[0], 2 * dense.shape[1], queries, dense.shape[3]
        q = torch.randn(shape, generator=generator, dtype=dense.dtype)
        lengths = torch.tensor([coded, length - coded])
        got = torch.ops.apack.attend(
            q, None, side, side, lengths, 0.2, layout.spec, layout.spec
        )  # fmt: skip
        seen = ~dropped_tokens(store)[:, :length]
        there = torch.ops.apack.present(side, side, lengths, length, layout.spec, layout.spec)
        assert torch.equal(there, seen)
        every = dense.repeat_interleave(2, 1)
        want = torch.nn.functional.scaled_dot_product_attention(
            q, every, every, seen[:, None, None], scale=0.2
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(dense.abs().max()))

    @rule(target=pairs, pair=pairs)
    def share(self, pair: Pair) -> Pair:
        return self.keep(pair.each(Tensor.detach))

    @rule(pair=pairs)
    def check_no_more(self, pair: Pair) -> None:
        self.known = [p for p in self.known if p is not pair]
