from __future__ import annotations

import pytest
import torch

from benchmarks.quality.later_tokens import METHODS, measure
from benchmarks.quality.packed import PackedRunner
from benchmarks.quality.runner import Setting

from . import tiny


@pytest.mark.parametrize("name", ["without tiers", "tiers"])
@torch.no_grad()
def test_what_follows_is_coded_and_costs_something(name: str) -> None:
    subject = tiny.subject()
    setting = Setting(subject, tiny.texts(2, 256), 128, "eager", (128, 256))
    options = {"ratio": 4, **METHODS[name]}
    rows = tiny.texts(2, 256) + 1
    runner = PackedRunner(setting, options, beforehand=True, coded_once=False)
    found = measure(runner, rows, 128)
    assert found["coded_later"] == 96  # a block of 32 may fill before one is coded
    assert 0 < found["kl"] == pytest.approx(sum(found["kl_each"]) / 2)
    exact = PackedRunner(setting, options, beforehand=True, coded_once=True)
    assert measure(exact, rows, 128)["coded_later"] == 0
