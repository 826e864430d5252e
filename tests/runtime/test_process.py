"""What else goes on in a process: threads, forks, resets, modes, other models."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

import apack_compile
from apack_compile import PackedKV
from apack_compile.fitting.layer import LEARNING, PROFILES

from .. import plain

EXACT = {"codec": "exact", "inner": "eager", "window": 8, "block": 16}
FITTED = {"ratio": 4, "fit_tokens": 64, "inner": "eager", "window": 8, "block": 16}
STEPS = 40


def decode(model: Any, start: int = 0, length: int = 90, steps: int = STEPS) -> Tensor:
    """Greedy tokens behind a prompt that begins with word ``start``."""
    ids = torch.arange(start, start + length)[None]
    return plain.plain_generate(model, ids, torch.ones_like(ids), steps, "bool")[0]


def compiled(model: Any, options: dict[str, Any] = EXACT) -> Any:
    return torch.compile(model, backend="attentionpack", options=options)


def decoder(seed: int, layers: int = 1) -> plain.PlainDecoder:
    torch.manual_seed(seed)
    return plain.PlainDecoder(layers).eval()


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """Results of all works, begun at once."""
    start = threading.Barrier(len(works))
    found: dict[int, Any] = {}

    def run(number: int) -> None:
        start.wait()
        with torch.no_grad():
            found[number] = works[number]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [found[i] for i in range(len(works))]


def test_two_threads_decode_with_one_compiled_model_and_compile_once() -> None:
    """Bug: both compiled the same graph."""
    model = decoder(0)
    want = [decode(model, start) for start in (0, 50)]
    ours = compiled(model)
    got = in_threads(lambda: decode(ours, 0), lambda: decode(ours, 50))
    assert all(map(torch.equal, got, want))
    report = apack_compile.report(model)
    assert report.recompiles == 0, str(report)
    assert report.attends == 2 * (STEPS - 1)


def test_two_threads_with_a_model_each() -> None:
    models = [decoder(seed) for seed in range(2)]
    want = [decode(model) for model in models]
    first, second = (compiled(model) for model in models)
    got = in_threads(lambda: decode(first), lambda: decode(second))
    assert all(map(torch.equal, got, want))
    assert [apack_compile.report(model).attends for model in models] == [STEPS - 1] * 2


def test_several_models_take_turns() -> None:
    models = [decoder(seed, layers) for seed, layers in enumerate((1, 2, 1))]
    want = [decode(model, steps=12) for model in models]
    every = [compiled(model, options) for model, options in zip(models, (EXACT,) * 3, strict=True)]
    for _ in range(2):
        got = [decode(ours, steps=12) for ours in every]
        assert all(map(torch.equal, got, want))
    assert [apack_compile.report(m).attends for m in models] == [22, 44, 22]


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
def test_a_forked_child_decodes_and_learns_though_a_thread_was_learning() -> None:
    """Bug: the child waited for ever for a lock of a thread that it does not have."""
    model = decoder(0)
    want, ours, fitted = decode(model), compiled(model), compiled(model, FITTED)
    assert torch.equal(decode(ours), want)
    decode(fitted)
    held, go = threading.Event(), threading.Event()

    def learn() -> None:
        with LEARNING:
            held.set()
            go.wait()

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def work() -> None:
        torch.set_num_threads(1)  # without it PyTorch itself hangs, in any product
        PROFILES.clear()
        results.put((decode(ours).tolist(), decode(ours, 3, 70).shape, decode(fitted).shape))

    thread = threading.Thread(target=learn)
    thread.start()
    held.wait()
    child = context.Process(target=work, daemon=True)
    child.start()
    child.join(60)
    ended = child.exitcode
    child.kill()
    go.set()
    thread.join()
    assert ended == 0
    assert results.get() == (want.tolist(), (1, STEPS), (1, STEPS))
    assert torch.equal(decode(ours), want), "the parent goes on"


def step(model: Any, past: Any, length: int) -> tuple[Tensor, Any]:
    valid = torch.ones(1, length + 1, dtype=torch.int64)
    mask = plain.plain_masks(valid, 1, "bool")
    logits, grown = model(torch.tensor([[length % 90]]), torch.tensor([[length]]), past, mask)
    return logits, grown


def prefill(model: Any, length: int) -> Any:
    ids = torch.arange(length)[None]
    mask = plain.plain_masks(torch.ones_like(ids), length, "bool")
    return model(ids, ids, None, mask)[1]


@pytest.mark.parametrize("options", [EXACT, FITTED], ids=["exact", "fitted"])
def test_a_live_cache_outlives_a_reset(options: dict[str, Any]) -> None:
    model = decoder(0)
    ours = compiled(model, options)
    past, dense = prefill(ours, 90), None
    for length in range(90, 130):
        if length == 110:
            torch._dynamo.reset()
            dense = tuple(tuple(side.unpack() for side in layer) for layer in past)
        logits, past = step(ours, past, length)
        if dense is not None:
            want, dense = step(model, dense, length)
            close = 1e-4 if options is EXACT else 0.1  # what was recent is coded meanwhile
            torch.testing.assert_close(logits, want, rtol=close, atol=close)
    assert all(isinstance(side, PackedKV) for layer in past for side in layer)
    assert apack_compile.report(model).attends == 20
    prefill(ours, 90)


MODES: list[Callable[[], AbstractContextManager[object]]] = [torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("begin", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("options", [EXACT, FITTED], ids=["exact", "fitted"])
def test_modes_may_change_from_step_to_step(options: dict[str, Any], begin: Any) -> None:
    model = decoder(0)
    ours = compiled(model, options)
    with begin():
        past = prefill(ours, 90)
        dense = tuple(tuple(side.unpack() for side in layer) for layer in past)
    for length in range(90, 130):
        with MODES[length // 3 % 2]():
            logits, past = step(ours, past, length)
            want, dense = step(model, dense, length)
        close = 1e-4 if options is EXACT else 0.1
        torch.testing.assert_close(logits, want, rtol=close, atol=close)
    assert all(isinstance(side, PackedKV) for layer in past for side in layer)
    report = apack_compile.report(model)
    assert report.attends == 40
    assert not any("uncompiled" in dict(graph.runs) for graph in report.graph_reports)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_of_the_model(dtype: torch.dtype) -> None:
    """Logits are as near to those in float64 as the dense cache's are."""
    model, exact = decoder(0, 2).to(dtype), decoder(0, 2).to(dtype).double()
    ours, logits = compiled(model), {}
    for name, run in {"dense": model, "packed": ours, "right": exact}.items():
        past, found = prefill(run, 90), []
        for length in range(90, 120):
            now, past = step(run, past, length)
            found.append(now.double())
        logits[name] = torch.cat(found)
        if run is ours:
            assert all(isinstance(side, PackedKV) for layer in past for side in layer)
            assert {side.dtype for layer in past for side in layer} == {dtype}
    errors = {name: float((x - logits["right"]).norm()) for name, x in logits.items()}
    assert errors["packed"] <= 1.2 * errors["dense"], errors
    assert apack_compile.report(model).attends == 60
