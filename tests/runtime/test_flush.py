"""Rings of many caches coded together, as one CUDA graph would do it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from apack_compile.cache import Policy, SideStore
from apack_compile.codec import Code, CodeRef
from apack_compile.codec.fixed import fixed_ref
from apack_compile.codec.lowrank import LowRankLayout, factor
from apack_compile.kernels.encode_later import encode_later
from apack_compile.lower.capture import Captured
from apack_compile.runtime import flush
from apack_compile.runtime.flush import Flush

from ..helpers import fitted_ref, modal_ref
from ..lower.fakes import FakeRecording

POLICY = Policy(sinks=2, extra=4, window=8, block=8, chunk=16)
REFS = [fixed_ref("int8", 2, 16), fixed_ref("int4", 2, 16)]


class PlainKernels:
    """What the Triton kernels compute, by plain operators."""

    def encode_more(
        self, x: Any, params: Any, layout: Any, payload: Any, pool: Any, positions: Any, begin: Any
    ) -> Any:
        args = params, layout, payload, pool, positions, begin
        return encode_later(x, *args, POLICY.sinks, POLICY.extra)


def stores(seed: int = 0) -> list[SideStore]:
    torch.manual_seed(seed)
    return [SideStore.encode(torch.randn(2, 2, 30, 16), ref, POLICY) for ref in REFS * 2]


def step(every: list[SideStore], flushing: Any, seed: int) -> None:
    """One decode step: room for a token, and the token."""
    flushing(every, [1] * len(every))
    generator = torch.Generator().manual_seed(seed)
    for store in every:
        new = torch.randn(2, 2, 1, 16, generator=generator)
        store.side.ring[:, :, store.recent : store.recent + 1] = new
        store.advance(1)


def one_by_one(every: list[SideStore], new: list[int]) -> None:
    for store, tokens in zip(every, new, strict=True):
        store.reserve(tokens)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """The graphs that are made, on a machine without a GPU."""
    made: list[Captured] = []

    def make(*args: Any, **more: Any) -> Captured:
        made.append(Captured(*args, record=FakeRecording, **more))
        return made[-1]

    monkeypatch.setattr(flush, "Captured", make)
    kernels = PlainKernels()
    monkeypatch.setattr(flush, "encode_kernels", lambda x, layout: kernels)
    monkeypatch.setattr(FakeRecording, "launches", 0)
    return made


def same(a: list[SideStore], b: list[SideStore]) -> None:
    for one, two in zip(a, b, strict=True):
        assert (one.coded, one.length) == (two.coded, two.length)
        torch.testing.assert_close(one.dense(one.length), two.dense(two.length), rtol=0, atol=0)
        torch.testing.assert_close(one.tally, two.tally, rtol=0, atol=0)


def test_all_rings_are_coded_by_one_graph_and_as_one_by_one(captured: list[Captured]) -> None:
    together, alone, flushing = stores(), stores(), Flush(capture=True)
    for i in range(100):
        step(together, flushing, i)
        step(alone, one_by_one, i)
    same(together, alone)
    assert len(captured) == 1
    assert not captured[0].reason
    assert captured[0].calls == 12 and FakeRecording.launches > 0
    assert 1 <= captured[0].captures < captured[0].calls


def test_rings_out_of_step_are_coded_apart(captured: list[Captured]) -> None:
    together, alone = stores(), stores()
    for every, flushing in ((together, Flush(capture=True)), (alone, one_by_one)):
        every[0].extend(torch.ones(2, 2, 3, 16))
        for i in range(20):
            step(every, flushing, i)
    same(together, alone)
    assert len(captured) == 2


EVERY = [
    fitted_ref(gain=False), fitted_ref(ratio=2, tiers=True), fitted_ref(gain=False, evict=0.4),
    fitted_ref(ratio=2, tiers=True, evict=0.4), modal_ref(gain=False),
    modal_ref(ratio=3, tiers=True, evict=0.4), fixed_ref("exact", 2, 8), fixed_ref("int8", 2, 8),
]  # fmt: skip
KEPT = [
    CodeRef(Code(replace(ref.layout, exact=200), ref.code.params))  # type: ignore[call-arg]
    for ref in EVERY[:2]
]


def plain_stores(refs: list[CodeRef], policy: Policy = POLICY) -> list[SideStore]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for ref in refs:
        x = torch.randn(2, 2, 300, 8, generator=generator)
        visual = torch.arange(300).expand(2, -1) < 110
        made.append(SideStore.encode(x, ref, policy, visual=visual))
    return made


@pytest.mark.parametrize("sinks", [2, 0])
def test_codes_without_kernels_are_captured_as_well(
    sinks: int, captured: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiers by importance, planes by kind, pools that grow: by plain operators."""
    monkeypatch.setattr(flush, "encode_kernels", lambda x, layout: None)
    policy = replace(POLICY, sinks=sinks, chunk=64)
    together, alone = plain_stores(EVERY + KEPT, policy), plain_stores(EVERY + KEPT, policy)
    flushing = Flush(capture=True)
    for i in range(120):
        generator = torch.Generator().manual_seed(i)
        flushing(together, [1] * len(together))
        one_by_one(alone, [1] * len(alone))
        for a, b in zip(together, alone, strict=True):
            new, weight = (torch.randn(2, *shape, generator=generator) for shape in ((2, 1, 8), ()))
            if i % 50 == 20:
                new[0, 0, 0, 0] = float("nan")
            for store in (a, b):
                here = slice(store.recent, store.recent + 1)
                store.side.ring[:, :, here] = new
                if store.importance is not None:
                    store.importance[:, here] = weight.abs()[:, None]
                store.advance(1)
    for a, b in zip(together, alone, strict=True):
        assert a.rows == b.rows and a.coded > 400
        for mine, right in zip(a.owned(), b.owned(), strict=True):
            assert torch.equal(mine.nan_to_num(7.0), right.nan_to_num(7.0))
        torch.testing.assert_close(a.tally, b.tally, rtol=0, atol=0)
    (call,) = captured
    assert not call.reason and FakeRecording.launches > 0
    assert 1 <= call.captures < call.calls


def test_bases_of_single_sequences_are_made_one_by_one(captured: list[Captured]) -> None:
    ref = factor(torch.randn(2, 2, 30, 16), LowRankLayout(2, 16, 4), None, None)
    store = SideStore.encode(torch.randn(2, 2, 30, 16), ref, POLICY)
    for i in range(20):
        step([store], Flush(capture=True), i)
    assert store.coded > 30 and not captured


def test_graphs_can_be_turned_off(captured: list[Captured]) -> None:
    together, flushing = stores(), Flush(capture=False)
    for i in range(20):
        step(together, flushing, i)
    assert not captured


def test_what_was_made_in_inference_mode_is_coded_outside_of_it(captured: list[Captured]) -> None:
    with torch.inference_mode():
        together = stores()
    alone, flushing = stores(), Flush(capture=True)
    for i in range(40):
        flushing(together, [1] * len(together))
        one_by_one(alone, [1] * len(alone))
        generator = torch.Generator().manual_seed(i)
        for a, b in zip(together, alone, strict=True):
            new = torch.randn(2, 2, 1, 16, generator=generator)
            with torch.inference_mode():
                a.side.ring[:, :, a.recent : a.recent + 1] = new
            b.side.ring[:, :, b.recent : b.recent + 1] = new
            a.advance(1)
            b.advance(1)
    same(together, alone)


class Interrupted(FakeRecording):
    """Where a flush is stopped: before its graph is launched, behind that, or in a capture."""

    where = ""

    def record(self, run: Any) -> list[Any]:
        if Interrupted.where == "capture":
            run()  # the host goes through all of it
            raise KeyboardInterrupt
        return super().record(run)

    def wait(self) -> None:
        if Interrupted.where == "before":
            raise KeyboardInterrupt

    def replay(self, args: Any, launched: Any = None) -> list[Any]:
        results = super().replay(args, launched)
        if Interrupted.where == "behind":
            raise KeyboardInterrupt
        return results


@pytest.mark.parametrize("where", ["before", "behind", "capture"])
def test_a_flush_that_is_interrupted_loses_no_token(
    where: str, captured: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: tokens counted as coded that were still in the ring alone."""
    monkeypatch.setattr(flush, "Captured", lambda *a, **m: Captured(*a, record=Interrupted, **m))
    monkeypatch.setattr(flush, "encode_kernels", lambda x, layout: None)
    policy = replace(POLICY, chunk=64)
    every, flushing = plain_stores(EVERY[:4], policy), Flush(capture=True)
    alone = plain_stores(EVERY[:4], policy)

    def decode(steps: int) -> None:
        for i in range(steps):
            generator = torch.Generator().manual_seed(i)
            flushing(every, [1] * 4)
            one_by_one(alone, [1] * 4)
            for a, b in zip(every, alone, strict=True):
                new = torch.randn(2, 2, 1, 8, generator=generator)
                for store in (a, b):
                    store.side.ring[:, :, store.recent : store.recent + 1] = new
                    store.advance(1)

    decode(25)
    for store in every:  # at other addresses nothing is recorded yet
        if where == "capture":
            store.side = store.side._replace(ring=store.side.ring.clone())
    while not every[0].surplus(1):
        decode(1)
    held = [store.dense(store.length) for store in every]
    with monkeypatch.context() as m:
        m.setattr(Interrupted, "where", where)
        if where == "capture":  # as a GPU would say; and it would change no tensor
            m.setattr(flush, "_capturing", lambda x: True)
            m.setattr(flush, "encode_oldest", lambda *args: None)
        with pytest.raises(KeyboardInterrupt):
            flushing(every, [1] * 4)
    if where != "behind":
        for store, right in zip(every, held, strict=True):
            assert torch.equal(store.dense(store.length), right)
    decode(40)
    for a, b in zip(every, alone, strict=True):
        assert (a.coded, a.length, a.rows) == (b.coded, b.length, b.rows)
        assert torch.equal(a.dense(a.length), b.dense(b.length))
