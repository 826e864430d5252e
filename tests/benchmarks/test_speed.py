from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apack_compile.cache import Policy
from apack_compile.codec import CodeRef, TransformLayout
from apack_compile.codec.modal import modal
from apack_compile.cost import H100, PackedSide, seconds_of
from benchmarks.quality.packed import PackedRunner
from benchmarks.quality.runner import Setting
from benchmarks.quality.speed import BATCH, TOKENS, attend_us, markdown, plot, predicted
from benchmarks.quality.subject import Prompts

from ..helpers import hand_code
from . import tiny


def noted(**options: Any) -> tuple[Any, float | None]:
    """A cache of a tiny model, and what was noted of its codes."""
    subject = tiny.subject()
    setting = Setting(subject, tiny.texts(1, 256), 96, "eager", (256,))
    packed = PackedRunner(setting, {"ratio": 4, **options}, False, True)
    cache = packed.prefill(Prompts(subject, tiny.texts(2, 256) + 1))
    packed.sizes(cache)
    return cache, packed.notes()["attend_us"]


def test_time_is_the_mean_of_all_layers_with_the_default_policy_in_16_bits() -> None:
    cache, us = noted()
    times = []
    for layer in cache.layers:
        sides = [
            PackedSide.of(side.store.ref, Policy(), torch.bfloat16)
            for side in (layer.keys, layer.values)
        ]
        times.append(1e6 * seconds_of(*sides, 4, H100, BATCH, TOKENS))
    assert us == pytest.approx(sum(times) / 2)
    assert len(times) == 2 and us is not None and us > 3 * 1e6 * H100.launch


@pytest.mark.parametrize("options", [{"codec": "svd"}, {"tiers": True, "evict": 0.25}])
def test_codes_that_are_not_predicted_have_none(options: dict[str, Any]) -> None:
    assert noted(**options)[1] is None


def test_codes_by_kind_have_none() -> None:
    """Their time depends on the mixture."""
    plain = TransformLayout(2, 64, 1, 16, 32, 16, 1)
    ref = CodeRef(hand_code(modal(plain, plain)))
    assert attend_us([(ref, ref)], 4) is None


def test_keys_before_their_rotation_take_longer() -> None:
    (_, turned), (_, plain) = noted(k_code="pre-rope"), noted()
    assert turned is not None and plain is not None and turned > plain


def cell(name: str, ratio: float, us: float | None, kl: float) -> dict[str, Any]:
    figures = {"mean": kl, "low": kl / 2, "high": kl * 2}
    top1 = {"mean": 0.95, "low": 0.9, "high": 1.0}
    return {
        "method": name, "family": name, "ratio": ratio, "attend_us": us, "kl": figures,
        "top1": top1,
    }  # fmt: skip


def test_only_predicted_codes_are_shown_the_fastest_first(tmp_path: Path) -> None:
    rival = cell("rival", 8, None, 0.1)
    del rival["attend_us"]
    results = {"cells": [
        cell("slow", 4, 60.0, 0.001), cell("unknown", 8, None, 0.01), rival,
        cell("fast", 8, 40.04, 0.006),
    ]}  # fmt: skip
    assert [c["method"] for c in predicted(results)] == ["fast", "slow"]
    assert markdown(results).splitlines()[2:] == [
        "| fast | 8.00 | 40.0 | 0.006 | 95.0% |",
        "| slow | 4.00 | 60.0 | 0.001 | 95.0% |",
    ]
    pytest.importorskip("matplotlib")
    assert plot(results, tmp_path / "speed.svg")
    assert "predicted: H100" in (tmp_path / "speed.svg").read_text()
