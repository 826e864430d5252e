"""Decode steps as real CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import apack_compile
from apack_compile.lower.capture import Captured

from .. import zoo
from .test_cuda import on_device

pytestmark = pytest.mark.gpu

STEPS = 100


def generate(model: Any, inputs: dict[str, Tensor], steps: int = STEPS) -> Tensor:
    return model.generate(**inputs, max_new_tokens=steps, do_sample=False)


def captures(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """All that are made from now on."""
    made: list[Captured] = []
    init = Captured.__init__

    def remember(self: Captured, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Captured, "__init__", remember)
    return made


def test_captured_steps_give_the_tokens_of_uncaptured_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two models, three lengths, two batches; the cache grows and its ring is coded meanwhile."""
    made = captures(monkeypatch)
    case, twin = on_device(zoo.llama(2, True, text=300)), on_device(zoo.llama(1, text=200))
    for p in twin.model.parameters():
        p.mul_(1.2)
    short = {name: t[:1, :90].clone() for name, t in twin.inputs.items()}
    jobs = [(case, case.inputs), (twin, twin.inputs), (twin, short)]
    results = []
    for setting in (False, True):
        torch._dynamo.reset()
        options = {"codec": "exact", "inductor": {"triton.cudagraphs": setting}}
        compiled = {
            id(c): torch.compile(c.model, backend="attentionpack", options=options)
            for c in (case, twin)
        }
        results.append([generate(compiled[id(c)], inputs) for c, inputs in jobs * 2])
        assert bool(made) == setting
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert sum(m.captures for m in made) and not any(m.reason for m in made)


def test_it_is_the_default_and_steps_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = captures(monkeypatch)
    case = on_device(zoo.llama(1, text=300), torch.bfloat16)
    compiled = torch.compile(case.model, backend="attentionpack", options={"ratio": 8})
    for _ in range(2):
        generate(compiled, case.inputs)
    assert apack_compile.report(case.model).recompiles == 0
    assert sum(m.captures for m in made) >= 1
    assert sum(m.captures for m in made) <= 8, "captured again and again"


def test_results_of_a_replay_are_not_overwritten_by_the_next() -> None:
    call = Captured(lambda x: (x * 2, x.sum()), frozenset())
    xs = torch.randn(8, 100, device="cuda")
    results = [call([x.clone()]) for x in xs]
    assert call.captures == 1
    for x, (double, total) in zip(xs, results, strict=True):
        assert torch.equal(double, x * 2) and torch.equal(total, x.sum())


def test_random_numbers_are_new_in_every_replay() -> None:
    call = Captured(lambda x: (x + torch.rand_like(x),), frozenset())
    x = torch.zeros(100, device="cuda")
    drawn = torch.stack([call([x])[0] for _ in range(6)])
    assert call.captures == 1 and len(drawn.unique(dim=0)) == 6
    torch.rand(3, device="cuda")


def test_what_cannot_be_captured_runs_and_leaves_the_device_usable() -> None:
    call = Captured(lambda x: (x * x.sum().item(),), frozenset())
    x = torch.ones(4, device="cuda")
    for _ in range(4):
        assert torch.equal(call([x])[0], x * 4)
    assert call.captures == 1 and call.reason
    other = Captured(lambda x: (x + 1 + 0 * torch.rand_like(x),), frozenset())
    for _ in range(4):
        assert torch.equal(other([x])[0], x + 1)
    assert other.captures == 1 and not other.reason
    assert torch.rand(100, device="cuda").std() > 0


def test_inside_a_graph_that_the_user_captures_nothing_is_captured() -> None:
    call = Captured(lambda x: (x * 2,), frozenset())
    x = torch.ones(4, device="cuda")
    for _ in range(3):
        call([x])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call([x])[0]
    x.fill_(3)
    graph.replay()
    assert torch.equal(out, x * 2)


def test_replays_on_several_streams_take_turns() -> None:
    call = Captured(lambda x: ((x @ x).sum(0) / 1e3,), frozenset())
    xs = [torch.randn(1500, 1500, device="cuda") for _ in range(2)]
    wanted = [call([x])[0] for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for n in range(24):
        with torch.cuda.stream(streams[n % 3]):
            results.append(call([xs[n % 2]])[0])
    torch.cuda.synchronize()
    assert call.captures == 1
    for n, got in enumerate(results):
        torch.testing.assert_close(got, wanted[n % 2])
