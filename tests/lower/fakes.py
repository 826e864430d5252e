"""Captured graphs without a GPU: static memory and replays, as CUDA graphs have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from apack_compile import compat, lower
from apack_compile.lower import decode
from apack_compile.lower.capture import Captured
from apack_compile.lower.recording import Recording
from apack_compile.lower.split import ATTENDS


class FakeRecording(Recording):
    """Every launch runs the function, on the recording's inputs and into its outputs."""

    launches = 0

    def record(self, run: Callable[[], list[Any]]) -> list[Any]:
        self.run = run
        return []  # a capture runs nothing

    def wait(self) -> None:
        pass

    def launch(self) -> None:
        FakeRecording.launches += 1
        if not self.outputs:
            self.outputs = self.run()
            return
        with torch.inference_mode():  # outputs may have been made in it; a graph does not care
            for own, new in zip(self.outputs, self.run(), strict=True):
                if isinstance(own, Tensor):
                    own.copy_(new)


def eagerly(gm: fx.GraphModule, fakes: Sequence[Any], config: dict[str, Any]) -> Any:
    """In place of Inductor."""
    return gm


def pretend(monkeypatch: pytest.MonkeyPatch) -> type[FakeRecording]:
    """Let decode graphs on a CPU be compiled as if they were on a GPU."""

    def is_decode(gm: fx.GraphModule, fakes: Sequence[Any]) -> bool:
        return any(n.target in ATTENDS for n in gm.graph.nodes)

    monkeypatch.setattr(lower, "is_decode", is_decode)
    monkeypatch.setattr(decode, "Captured", partial(Captured, record=FakeRecording))
    monkeypatch.setattr(compat, "_inductor", eagerly)
    monkeypatch.setattr(FakeRecording, "launches", 0)
    return FakeRecording
