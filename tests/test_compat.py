"""What graphs with our operators ask of Inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.exc import CppCompileError, InductorError

from apack_compile import compat, ops  # noqa: F401  (registers the operators)
from apack_compile.compat import compile_inner


def graph(target: Any, *arguments: Any) -> fx.GraphModule:
    made = fx.Graph()
    mask = made.placeholder("mask")
    made.output((made.call_function(target, (mask, *arguments)),))
    return fx.GraphModule(torch.nn.Module(), made)


@pytest.mark.parametrize("padded", [True, False])
def test_strides_are_not_padded_where_our_operators_read(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: keys were read in a layout that they were not written in, where strides are padded."""
    seen: list[dict[str, Any]] = []

    def compile_fx(gm: Any, inputs: Any, config_patches: dict[str, Any]) -> Any:
        seen.append(config_patches)
        return gm

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    given = {"comprehensive_padding": padded, "max_autotune": True}
    compile_inner("inductor", graph(torch.ops.apack.visible.default, 1, 5), [mask], given)
    compile_inner("inductor", graph(torch.logical_not), [mask], given)
    ours = {"comprehensive_padding": False, "max_autotune": True, "triton.cudagraphs": False}
    assert seen == [ours, given]


@pytest.mark.parametrize("chosen", [False, True])
def test_code_with_checks_that_does_not_build_is_compiled_without(
    chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug of Inductor in torch 2.11 and 2.12: an index is checked before it is computed (CPU)."""
    seen: list[dict[str, Any]] = []

    def compile_fx(gm: Any, inputs: Any, config_patches: dict[str, Any]) -> Any:
        seen.append(config_patches)
        if config_patches.get(compat.CHECKS, True):
            gm.graph.erase_node(gm.graph.output_node())  # it takes the graph over
            raise InductorError(CppCompileError(["g++"], "tmp2 was not declared"), None)
        return gm

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    monkeypatch.setattr(compat, "torch_version", lambda: (2, 12))
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    if chosen:
        with pytest.raises(InductorError):
            compile_inner("inductor", graph(torch.logical_not), [mask], {compat.CHECKS: True})
        assert seen == [{compat.CHECKS: True}]
        return
    (result,) = compile_inner("inductor", graph(torch.logical_not), [mask], {})(mask)
    assert torch.equal(result, ~mask)
    assert seen == [{}, {compat.CHECKS: False}]
