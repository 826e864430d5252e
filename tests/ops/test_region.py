"""Operators compiled on their own: for whom, and how often."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from apack_compile import backend
from apack_compile.ops import region
from apack_compile.ops.region import CALLER, Caller, Grows, Region, config_key
from apack_compile.source_hash import keyed


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The configurations with which something was compiled."""
    configs: list[dict[str, Any]] = []

    def compile_inner(inner: str, gm: Any, inputs: Any, config: dict[str, Any]) -> Any:
        configs.append(config)
        return gm

    monkeypatch.setattr(region, "compile_inner", compile_inner)
    yield configs


def doubling() -> Region:
    return Region(torch.ops.aten.add.Tensor, lambda x, y: [Grows(dims=(1,), alike=True)] * 2)


def call(it: Region, width: int, config: dict[str, Any], counts: list[int]) -> None:
    token = CALLER.set(Caller(config, config_key(config), lambda: counts.append(1)))
    try:
        x = torch.randn(2, width)
        torch.testing.assert_close(it(x, x), 2 * x)
    finally:
        CALLER.reset(token)


def test_one_artifact_serves_all_lengths(compiled: list[dict[str, Any]]) -> None:
    it, counts = doubling(), []
    for width in (3, 4, 50):
        call(it, width, {}, counts)
    assert len(compiled) == len(counts) == 1


def test_every_configuration_has_an_artifact_of_its_own(compiled: list[dict[str, Any]]) -> None:
    """Bug: the first caller's mode decided for all."""
    it, one, two = doubling(), [], []
    call(it, 3, keyed({}), one)
    call(it, 3, keyed({"max_autotune": True}), two)
    call(it, 3, keyed({}), one)
    assert [config.get("max_autotune") for config in compiled] == [None, True]
    assert (len(one), len(two)) == (1, 1)


def test_a_reset_forgets_what_was_compiled(compiled: list[dict[str, Any]]) -> None:
    it, counts = doubling(), []
    call(it, 3, {}, counts)
    backend.reset()
    call(it, 3, {}, counts)
    assert len(compiled) == 2
