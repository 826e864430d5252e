"""Decode graphs in two halves, on real graphs: the tokens are those of eager mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import apack_compile
from apack_compile import PackedKV
from apack_compile.lower import decode
from apack_compile.lower.decode import CUDAGRAPHS, Inseparable

from .. import plain, versions, zoo
from .fakes import eagerly, pretend
from .test_split import CLOSE, masked
from .test_split import decode as decode_graph

STEPS = 40


def generate(model: Any, case: zoo.Case, steps: int = STEPS) -> Any:
    return model.generate(
        **case.inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True
    )


def compiled(case: zoo.Case, **options: Any) -> Any:
    return torch.compile(case.model, backend="attentionpack", options={"codec": "exact", **options})


@pytest.mark.skipif(versions.BEFORE_5, reason="masks are made by vmap: nothing is captured")
def test_captured_steps_give_the_tokens_of_eager_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two models, with other batches, lengths and caches: a recording serves its own alone."""
    cases = [zoo.llama(2, True, text=50), zoo.llama(1, text=40)]
    other = zoo.llama(1, text=40)
    for p in other.model.parameters():
        p.mul_(1.5)
    cases.append(other)
    expected = [generate(c.model, c).sequences for c in cases]
    fake = pretend(monkeypatch)
    mine, theirs = compiled(cases[0]), compiled(other)
    for number in (0, 1, 2, 0):
        out = generate(theirs if number == 2 else mine, cases[number])
        assert torch.equal(out.sequences, expected[number])
        assert isinstance(out.past_key_values.layers[0].keys, PackedKV)
    assert fake.launches > 2 * STEPS
    assert apack_compile.report(cases[0].model).recompiles == 0


@pytest.mark.skipif(versions.BEFORE_5, reason="masks are made by vmap: nothing is captured")
def test_captured_steps_know_of_tokens_what_uncaptured_ones_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recording writes the importance where it is, once a step; over two flushes of the ring."""
    case = zoo.llama(2, True, text=90)
    options = {"ratio": 4, "fit_tokens": 64, "window": 8, "block": 32, "tiers": True}
    fake, found = None, []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        ours = compiled(case, codec="transform", inner=inner, profile_cache=False, **options)
        generate(ours, case, 1)
        fake = pretend(monkeypatch) if inner == "inductor" else None
        found.append(generate(ours, case, 70))
    assert fake is not None and fake.launches > 40
    assert torch.equal(found[0].sequences, found[1].sequences)
    for one, two in zip(*(out.past_key_values.layers for out in found), strict=True):
        mine, theirs = one.values.store, two.values.store
        assert mine.coded == theirs.coded >= 83 + 64
        torch.testing.assert_close(mine.importance, theirs.importance)
        for a, b in zip(mine.side.payload, theirs.side.payload, strict=True):
            assert torch.equal(a[:, : mine.coded], b[:, : mine.coded])


def test_a_step_with_a_vmap_is_packed_and_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: no step of transformers 4.57 was compiled for a GPU, and its caches were dense."""
    torch.manual_seed(0)
    model = plain.MappedDecoder().eval()
    fake = pretend(monkeypatch)
    ours = torch.compile(model, backend="attentionpack", options={"codec": "exact"})
    ids = torch.randint(0, 50, (2, 40))
    past = dense = None
    for length in range(40, 45):
        got, past = ours(ids, torch.arange(length), past)
        wanted, dense = model(ids, torch.arange(length), dense)
        torch.testing.assert_close(got, wanted)
        assert isinstance(past[0][0], PackedKV)
        ids = wanted[:, -1:].argmax(-1)
    assert fake.launches == 0


@pytest.mark.parametrize("why", ["setting", "inseparable"])
def test_without_a_recording_the_graph_runs_whole(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inseparable(*args: Any) -> Any:
        raise Inseparable("no reason")

    fake = pretend(monkeypatch)
    if why == "inseparable":
        monkeypatch.setattr(decode, "split", inseparable)
    config = {CUDAGRAPHS: False} if why == "setting" else {}
    gm, args, _ = decode_graph(masked, torch.rand(2, 31), dynamic=[0])
    expected = gm(*[a.clone() if isinstance(a, Tensor) else a for a in args])
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
    run = decode.compile_decode(gm, fakes, config, eagerly)
    for _ in range(4):
        torch.testing.assert_close(list(run(*args)), list(expected), **CLOSE)
    assert fake.launches == 0
