"""One compiled model through many prompts: compilations are bounded, and nothing piles up."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import apack_compile
from apack_compile.cache import SideStore
from apack_compile.codec import Code
from apack_compile.fitting.layer import PROFILES
from apack_compile.runtime.specialise import Specialised
from apack_compile.runtime.visual import MEMORY

from .. import plain

PROMPTS = 50
WARM = 20
"""Prompts after which nothing new is compiled or kept."""

GRAPHS = 8
"""Prefill and decode: of one length and batch, of any length, of any batch, of both."""

FITTED = {"ratio": 4, "fit_tokens": 64, "inner": "eager", "window": 8, "block": 16}
EXACT = {"codec": "exact", "inner": "eager", "window": 8, "block": 16}


def alive() -> dict[str, int]:
    """What is alive and could pile up, by number."""
    gc.collect()
    objects = gc.get_objects()
    kinds = {kind.__name__: kind for kind in (Tensor, SideStore, Code, Specialised)}
    found = {name: sum(isinstance(o, kind) for o in objects) for name, kind in kinds.items()}
    return {**found, "layers": len(PROFILES._by_weight), "words": len(MEMORY._known)}


@pytest.mark.parametrize("options", [EXACT, FITTED], ids=["exact", "fitted"])
def test_fifty_prompts_of_any_length_and_batch(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = plain.PlainDecoder(layers=1).eval()
    ours = torch.compile(model, backend="attentionpack", options=options)
    draw, seen, compiled = random.Random(0), {}, {}
    gc.unfreeze()  # the fixture of the suite hides what was there before
    for number in range(PROMPTS):
        if number in (WARM, PROMPTS - 1):
            seen[number] = alive()
            report = apack_compile.report(model)
            compiled[number] = report.graphs, report.recompiles
        batch, length = draw.randint(1, 4), draw.randint(65, 150)
        ids = torch.randint(10, 190, (batch, length))
        valid = (torch.arange(length) >= torch.randint(0, 6, (batch, 1))).long()
        steps = draw.choice((3, 5, 7, 30))  # thirty code the ring
        tokens, past = plain.plain_generate(ours, ids, valid, steps, "bool")
        if options is EXACT:
            assert torch.equal(tokens, plain.plain_generate(model, ids, valid, steps, "bool")[0])
        del past, tokens
    assert compiled[PROMPTS - 1] == compiled[WARM]
    assert all(seen[PROMPTS - 1][kind] <= count for kind, count in seen[WARM].items()), seen
    report = apack_compile.report(model)
    runs = [kind for graph in report.graph_reports for kind, _ in graph.runs]
    assert set(runs) <= {"fit", "encode", "decode"}, "no eager fall-back"
    assert report.graphs + report.recompiles <= GRAPHS, str(report)
    assert report.packed_bytes == 0
