"""Any history of a cache with a fitted code: the pool and the ring stay exact, the rest is coded.

Caches are float64 here: in float32, a coefficient on the border of two levels is rounded one way or
the other by how many tokens are coded together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from torch import Tensor

from apack_compile.cache import PackedKV, Policy, SideStore
from apack_compile.codec import Code, CodeRef, ModalLayout, TransformLayout
from apack_compile.codec.kinds import VISUAL
from apack_compile.codec.layout import KEPT_OF, SPARE
from apack_compile.codec.modal import joined

from ..helpers import at_every_level, few, fitted_ref, modal_ref
from .histories import Histories, Pair, pairs

POLICY = Policy(sinks=2, extra=SPARE + 2, window=8, block=16, chunk=16)
NAN, INF = float("nan"), float("inf")


def turned(ref: CodeRef) -> CodeRef:
    """The same code for tokens turned back from their positions."""
    layout = ref.layout
    assert isinstance(layout, TransformLayout)
    waves = torch.tensor([[0.7], [0.2]]).expand(2, layout.dim)
    return CodeRef(Code(replace(layout, rotary=layout.dim), (*ref.code.params, waves)))


def turned_modal(ref: CodeRef) -> CodeRef:
    """The same of a code for each kind of tokens."""
    layout, params = ref.layout, ref.code.params
    assert isinstance(layout, ModalLayout)
    codes = zip(layout.by_kind, layout.parts(params), strict=True)
    text, visual = (turned(CodeRef(Code(*each))) for each in codes)
    return CodeRef(joined(visual.code, text.code, (1, 1)))


def kept(ref: CodeRef) -> CodeRef:
    """The same code with a fifth of the tokens exact."""
    assert isinstance(ref.layout, TransformLayout | ModalLayout)
    return CodeRef(Code(replace(ref.layout, exact=KEPT_OF // 5), ref.code.params))


KEYS, VALUES = fitted_ref(gain=False), fitted_ref(ratio=2)
TIERED = fitted_ref(ratio=2, tiers=True)
THINNED = fitted_ref(gain=False, evict=0.4)
SETUPS: dict[str, tuple[CodeRef, Policy]] = {
    "keys": (KEYS, POLICY),
    "values": (VALUES, POLICY),
    "keys before their rotation": (turned(KEYS), POLICY),
    "values, no sinks": (VALUES, replace(POLICY, sinks=0)),
    "values in tiers": (TIERED, POLICY),
    "keys, some exact": (kept(KEYS), POLICY),
    "keys, some dropped": (THINNED, POLICY),
    "keys before their rotation, some dropped, some exact": (kept(turned(THINNED)), POLICY),
    "values in tiers, some dropped": (fitted_ref(ratio=2, tiers=True, evict=0.3), POLICY),
    "values in tiers, some exact, no sinks": (kept(TIERED), replace(POLICY, sinks=0)),
    "keys by kind": (modal_ref(gain=False), POLICY),
    "values by kind": (modal_ref(), POLICY),
    "keys by kind, before their rotation": (turned_modal(modal_ref(gain=False)), POLICY),
    "values by kind, no sinks": (modal_ref(), replace(POLICY, sinks=0)),
    "keys by kind, some dropped": (modal_ref(gain=False, evict=0.4), POLICY),
    "values by kind in tiers": (modal_ref(ratio=3, tiers=True), POLICY),
    "values by kind in tiers, some dropped, some exact": (
        kept(modal_ref(ratio=3, tiers=True, evict=0.4)),
        POLICY,
    ),
    "values by kind in tiers, no sinks": (
        kept(modal_ref(ratio=3, tiers=True)),
        replace(POLICY, sinks=0),
    ),
}


def through_code(ref: CodeRef, x: Tensor, places: Tensor) -> Tensor:
    """What the code makes of each token at each level: ``[B, levels * H, T, D]``."""
    finite = torch.where(x.isfinite(), x, 0.0)
    return torch.cat(at_every_level(ref, finite, places[:, 0, :, 0]), 1)


@dataclass
class CodedPair(Pair):
    """A pair, and what is known of its tokens.

    Attributes:
        coded: ``[B, levels * H, S, D]``: tokens as the code gives them back, wherever they are
            kept, at each level that they may be of.
        places: ``[B, 1, S, 1]``: positions counted from the first visible token of a row.
        visual: ``[B, 1, S, 1]`` bool: tokens that were coded as visual ones, if there are kinds.
    """

    coded: Tensor
    places: Tensor
    visual: Tensor

    @property
    def store(self) -> SideStore:
        assert isinstance(self.packed, PackedKV) and self.packed.store is not None
        return self.packed.store

    @property
    def length(self) -> int:
        return self.dense.shape[2]

    @property
    def coded_count(self) -> int:
        return min(self.store.coded, self.length)

    @property
    def recent(self) -> Tensor:
        """Tokens in the ring: ``[S, 1]``; ``sinks``, ``broken``, ``pooled``: ``[B, 1, S, 1]``."""
        return torch.arange(self.length)[:, None] >= self.store.coded

    @property
    def sinks(self) -> Tensor:
        return (self.places >= 0) & (self.places < self.store.policy.sinks)

    @property
    def broken(self) -> Tensor:
        return ~self.dense.isfinite().all(-1, keepdim=True).all(1, keepdim=True)

    @property
    def pooled(self) -> Tensor:
        positions = self.store.side.pool_positions[:, :, None]
        return (positions == torch.arange(self.length)).any(1)[:, None, :, None]

    @property
    def strained(self) -> Tensor:
        """Tokens of each row that took a slot as the code holds them badly: ``[B]``."""
        return (self.pooled & ~self.sinks & ~self.broken).flatten(1).sum(1)

    @property
    def share(self) -> int:
        """How many of a row the code may have at most, but for what was left of more by a crop."""
        return self.store.ref.layout.slots(self.store.policy.extra, self.coded_count) - SPARE

    @property
    def room(self) -> Tensor:
        """Broken tokens that each row still has slots for: ``[B]``.

        By the tokens that are there: a crop gives the others' slots back, and strained tokens leave
        SPARE of them.
        """
        return SPARE - (self.broken & ~self.sinks).flatten(1).sum(1)

    def each(self, operation: Callable[[Tensor], Tensor]) -> CodedPair:
        before = self.coded_count
        made = super().each(operation)
        assert made.coded_count == min(before, made.length)
        return made

    def append(self, new: Tensor) -> CodedPair:
        before, policy, ref = self.coded_count, self.store.policy, self.store.ref
        strained = self.strained
        places = self.places[:, :, -1:] + 1 + torch.arange(new.shape[2])[:, None]
        made = CodedPair(
            torch.cat([self.packed, new], 2),
            torch.cat([self.dense, new], 2),
            torch.cat([self.coded, through_code(ref, new, places)], 2),
            torch.cat([self.places, places], 2),
            torch.cat([self.visual, torch.zeros_like(places, dtype=torch.bool)], 2),
        )
        assert made.coded_count <= max(before, made.length - policy.window)
        assert made.length - made.coded_count <= policy.ring
        assert (made.strained <= strained.clamp(min=made.share)).all()
        return made

    def check(self) -> None:
        """The handle reads exact tokens and coded ones, each where it should."""
        got = self.packed.unpack()  # type: ignore[attr-defined]
        assert got.shape == self.dense.shape
        exact = self.sinks | self.broken | self.recent | self.pooled
        assert_same_tokens(got, torch.where(exact, self.dense, got), 0)
        assert_same_tokens(got, torch.where(exact, got, self.nearest(got)), 1e-12)  # rounding
        if self.store.ref.layout.kept:
            padding = (self.places < 0) & bool(self.store.policy.sinks)
            wasted = self.pooled & ~self.sinks & ~self.broken & (padding | self.recent)
            assert not wasted.any()

    def nearest(self, got: Tensor) -> Tensor:
        """The coded tokens at the level that each has been given."""
        levels = self.coded.unflatten(1, (-1, got.shape[1]))  # [B, levels, H, S, D]
        off = (levels - got[:, None]).abs().amax((2, 4), keepdim=True)  # [B, levels, 1, S, 1]
        kinds = self.store.ref.layout.kinds_of(torch.arange(levels.shape[1]))
        if kinds is not None:
            mine = (kinds == VISUAL)[:, None, None, None] == self.visual[:, None]
            off = torch.where(mine, off, torch.inf)
        best = off.nan_to_num().argmin(1, keepdim=True).expand(-1, 1, *levels.shape[2:])
        return levels.gather(1, best)[:, 0]

    def check_cast(self, dtype: torch.dtype) -> None:
        """Exact tokens are cast, coded ones rounded once more at most."""
        got = self.packed.to(dtype).unpack()  # type: ignore[attr-defined]
        exact = self.sinks | self.broken | self.recent | self.pooled
        assert_same_tokens(got, torch.where(exact, self.dense.to(dtype), got), 0)
        close = torch.where(exact, got, self.nearest(got.double()).to(dtype))
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got, close, rtol=eps, atol=eps, equal_nan=True)


def assert_same_tokens(got: Tensor, want: Tensor, atol: float) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol, equal_nan=True)


Blemish = tuple[int, int, float]
"""Row, token counted from the last one, and what becomes of it: a factor or a broken number."""

blemishes = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 70), st.sampled_from([20.0, 90.0, NAN, INF, -INF])),
    max_size=3,
)


class PooledHistories(Histories):
    def tokens(self, room: Tensor, count: int, marks: list[Blemish], among: int = 0) -> Tensor:
        """Tokens ``[B, 2, count, 8]``; with ``among``, blemishes are in so many last ones."""
        x = torch.randn(len(room), 2, count, 8, generator=self.generator(), dtype=torch.float64)
        room = room.tolist()
        for row, back, mark in marks:
            row, token = row % len(room), -1 - back % (among or count)
            if abs(mark) < INF:
                x[row, :, token] *= mark
            elif room[row] > 0:
                x[row, 1, token, 3] = mark
                room[row] -= 1
        return x

    @rule(
        target=pairs,
        setup=st.sampled_from(list(SETUPS)),
        pads=st.lists(st.sampled_from([0, 0, 1, 9]), min_size=1, max_size=3),
        count=st.integers(1, 60),
        marks=blemishes,
        share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    )
    def prefill(
        self, setup: str, pads: list[int], count: int, marks: list[Blemish], share: float
    ) -> CodedPair:
        ref, policy = SETUPS[setup]
        room = torch.full((len(pads),), SPARE)
        x = self.tokens(room, max(pads) + count, marks, among=count)
        places = torch.arange(x.shape[2])[:, None] - torch.tensor(pads)[:, None, None, None]
        seen = places[:, 0, :, 0] >= 0 if any(pads) else None
        visual = torch.rand(x.shape[0], x.shape[2], generator=self.generator()) < share  # [B, S]
        packed = PackedKV.pack(x, ref, policy, seen, visual)
        visual &= torch.arange(x.shape[2]) < x.shape[2] - policy.window  # others are text later
        visual = visual[:, None, :, None]
        pair = CodedPair(packed, x, through_code(ref, x, places), places, visual)
        assert pair.coded_count == max(pair.length - policy.window, 0)
        assert (pair.strained <= pair.share).all()
        return self.keep(pair)

    @rule(target=pairs, pair=pairs, count=st.integers(1, 80), marks=blemishes)
    def append(self, pair: CodedPair, count: int, marks: list[Blemish]) -> CodedPair:
        return self.keep(pair.append(self.tokens(pair.room, count, marks)))

    @rule(
        target=pairs,
        pair=pairs,
        counts=st.lists(st.integers(1, 5), min_size=1, max_size=10),
        marks=blemishes,
    )
    def decode(self, pair: CodedPair, counts: list[int], marks: list[Blemish]) -> CodedPair:
        for count in counts:
            pair = pair.append(self.tokens(pair.room, count, marks[:1]))
            marks = marks[1:]
        return self.keep(pair)

    @rule(pair=pairs, dtype=st.sampled_from([torch.float16, torch.bfloat16]))
    def cast(self, pair: CodedPair, dtype: torch.dtype) -> None:
        pair.check_cast(dtype)

    @invariant()
    def every_handle_has_its_tokens(self) -> None:
        for pair in self.known[-4:]:
            assert isinstance(pair, CodedPair)
            pair.check()


PooledHistories.TestCase.settings = settings(few, stateful_step_count=30)
TestPooledHistories = PooledHistories.TestCase


def pack(x: Tensor, sinks: int = 2, extra: int = SPARE + 2) -> PackedKV:
    return PackedKV.pack(x, KEYS, replace(POLICY, sinks=sinks, extra=extra))


def with_tokens(count: int, marks: dict[int, float]) -> Tensor:
    """One row; the tokens marked are multiplied, or broken in one number."""
    x = torch.randn(1, 2, count, 8, dtype=torch.float64)
    for token, mark in marks.items():
        if abs(mark) < INF:
            x[:, :, token] *= mark
        else:
            x[:, 0, token, 0] = mark
    return x


def broken_tokens(handle: PackedKV) -> list[int]:
    return (~handle.unpack().isfinite()).any(-1).any(1)[0].nonzero()[:, 0].tolist()


def test_strained_and_broken_tokens_take_slots_when_they_are_coded() -> None:
    """What the histories above are made of: without it they would compare codes alone."""
    parts = with_tokens(40, {9: 90.0}), with_tokens(60, {12: 20.0}), with_tokens(40, {5: INF})
    handle = pack(parts[0])
    for part in parts[1:]:
        handle = torch.cat([handle, part], 2)
    exact = [0, 1, 9, 52, 105]
    assert handle.store.side.pool_positions.tolist() == [[*exact, -1, -1, -1]]
    assert_same_tokens(handle.unpack()[:, :, exact], torch.cat(parts, 2)[:, :, exact], 0)


def test_a_crop_gives_back_the_slots_of_the_tokens_it_drops() -> None:
    """Bug: a crop leaves slots to tokens that are gone."""
    handle = pack(with_tokens(60, {40: NAN, 41: NAN}), extra=2)
    grown = torch.cat([handle[:, :, :30], with_tokens(40, {3: NAN})], 2)
    assert broken_tokens(grown) == [33]


def test_eight_broken_tokens_stay_exact_or_four_behind_strained_ones() -> None:
    """As the README says, with the slots that there are by default."""
    extra = Policy().extra
    nine = dict.fromkeys(range(20, 29), NAN)
    eight = with_tokens(60, dict(list(nine.items())[:8]) | dict.fromkeys(range(30, 40), 90.0))
    assert_same_tokens(pack(eight, extra=extra).unpack()[:, :, 20:28], eight[:, :, 20:28], 0)
    assert (~pack(with_tokens(60, nine), extra=extra).unpack().isfinite()).all(-1).any()
    handle = pack(with_tokens(60, dict.fromkeys(range(30, 40), 90.0)), extra=extra)
    later = with_tokens(60, dict.fromkeys(range(4), NAN))
    grown = torch.cat([handle, later], 2)
    assert_same_tokens(grown.unpack()[:, :, 60:64], later[:, :, :4], 0)
    later = with_tokens(60, dict.fromkeys(range(5), NAN))
    grown = torch.cat([handle.clone(), later], 2)
    assert grown.unpack()[:, :, 63].isnan().all()


def test_an_overflow_does_not_outlive_a_crop() -> None:
    """Bug: a sink that an overflow spoilt stays so."""
    handle = pack(with_tokens(60, {40: NAN, 41: NAN, 42: NAN}), extra=2)
    assert broken_tokens(handle[:, :, :30]) == []


def test_an_older_handle_knows_nothing_of_an_overflow() -> None:
    """Bug: an overflow spoils a sink that older handles share."""
    handle = pack(with_tokens(40, {}), extra=2)
    grown = torch.cat([handle, with_tokens(60, {3: NAN, 4: NAN, 5: NAN})], 2)
    assert grown.store is handle.store
    assert broken_tokens(handle) == []


def test_an_overflow_without_sinks_is_not_silent() -> None:
    """Bug: an overflow is marked in a slot whose token is gone."""
    handle = pack(with_tokens(60, {40: NAN, 41: NAN}), sinks=0, extra=2)
    grown = torch.cat([handle[:, :, :5], with_tokens(30, {0: NAN})], 2)
    assert broken_tokens(grown) != []


def test_a_copy_keeps_a_strained_token_when_slot_0_lies_behind_its_end() -> None:
    """Bug: unused slots write over a slot behind slot 0."""
    x = with_tokens(60, {0: 20.0, 20: 90.0})
    handle = pack(x, sinks=0)
    assert handle.store.side.pool_positions[0, :2].tolist() == [20, 0]  # the worst first
    assert torch.equal(handle[:, :, :10].unpack()[:, :, 0], x[:, :, 0])
    assert torch.equal(handle[:, :, :10].clone().unpack()[:, :, 0], x[:, :, 0])


def test_a_huge_token_is_strained() -> None:
    """Bug: the strain of a token whose square overflows is NaN."""
    x = with_tokens(60, {10: 1e20}).float()
    assert torch.equal(pack(x).unpack()[:, :, 10], x[:, :, 10])


def test_huge_tokens_do_not_hide_a_broken_one() -> None:
    """Bug: tokens of NaN strain are taken for the worst."""
    handle = pack(with_tokens(60, {**dict.fromkeys(range(10, 16), 1e20), 30: NAN}).float())
    assert broken_tokens(handle) != []
