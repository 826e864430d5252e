"""Layers of one cache on several devices, and weights that come and go."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import apack_compile
from apack_compile import PackedKV
from apack_compile.fitting.layer import PROFILES
from apack_compile.runtime.specialise import Specialised

from .. import plain

EXACT = {"codec": "exact", "inner": "eager", "window": 8, "block": 16}
FITTED = {"ratio": 4, "fit_tokens": 64, "inner": "eager", "window": 8, "block": 16}


class OneDevice(TorchDispatchMode):
    """Our operators get tensors of one device each, whatever they would put up with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "apack":
            leaves = tree_leaves((args, kwargs))
            (device,) = {x.device.type for x in leaves if isinstance(x, Tensor)}
            self.seen.add((func.__name__.partition(".")[0], device))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("codec", ["exact", "int8"])
def test_lengths_are_on_the_device_of_each_layer(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: all layers of a graph read lengths on the device of the first."""
    torch.manual_seed(0)
    model = plain.SpreadDecoder(2).eval()
    for part in (model.layers[1], model.norms[1], model.head):
        part.to("meta")
    whole = plain.plain_decoder()
    ours = torch.compile(model, backend="attentionpack", options={**EXACT, "codec": codec})
    ids, valid = torch.arange(60)[None], torch.ones(1, 60, dtype=torch.int64)
    mask, watch, call = plain.plain_masks(valid, 60, "bool"), OneDevice(), Specialised.__call__

    def watched(self: Specialised, args: Any) -> Any:
        with watch:
            return call(self, args)

    monkeypatch.setattr(Specialised, "__call__", watched)
    _, past = ours(ids, ids, None, mask)
    _, want = whole(ids, ids, None, mask)
    for length in range(60, 90):
        valid = torch.cat([valid, valid[:, :1]], 1)
        mask, place = plain.plain_masks(valid, 1, "bool"), torch.tensor([[length]])
        _, past = ours(place, place, past, mask)
        _, want = whole(place, place, want, mask)
    assert [{str(side.device) for side in layer} for layer in past] == [{"cpu"}, {"meta"}]
    assert all(isinstance(side, PackedKV) for layer in past for side in layer)
    assert {("attend", "cpu"), ("attend", "meta")} <= watch.seen
    for mine, right in zip(past[0], want[0], strict=True):
        close = 0 if codec == "exact" else 0.05
        torch.testing.assert_close(mine.unpack(), right, rtol=close, atol=close)


@pytest.mark.parametrize("options", [EXACT, FITTED], ids=["exact", "fitted"])
def test_weights_that_come_and_go_are_packed_and_reported(options: dict[str, Any]) -> None:
    """Accelerate's hooks break graphs at every layer and make parameters anew for each run.

    Bug: the report of such a model was empty.
    """
    ids = torch.arange(90)[None]
    torch.manual_seed(0)
    valid, model = torch.ones_like(ids), plain.PlainDecoder(layers=1).eval()
    want, _ = plain.plain_generate(model, ids, valid, 12, "bool")
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    ours = torch.compile(offloaded, backend="attentionpack", options=options)
    for _ in range(3):
        tokens, past = plain.plain_generate(ours, ids, valid, 12, "bool")
        assert all(isinstance(side, PackedKV) for layer in past for side in layer)
    assert options is FITTED or torch.equal(tokens, want)
    report = apack_compile.report(model)
    assert report.attends == 3 * 10, "keys come from another graph: the first step packs them"
    fits = sum(dict(graph.runs).get("fit", 0) for graph in report.graph_reports)
    assert fits == (options is FITTED)
    assert len(PROFILES._by_weight) == 0
