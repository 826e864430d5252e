"""One CUDA graph with its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Recording:
    """One captured run.

    Args:
        call: what is captured; it has run before.
        args: its arguments.
        copied: which of them are copied before each replay.
    """

    def __init__(
        self, call: Callable[..., Sequence[Any]], args: Sequence[Any], copied: Sequence[int]
    ) -> None:
        self.device = next(a.device for a in args if isinstance(a, Tensor))
        self.copied = copied
        with torch.inference_mode(False), torch.no_grad():  # later calls may be in another mode
            self.inputs = [core(twin(args[i])) for i in copied]
        given = list(args)
        for i, own in zip(copied, self.inputs, strict=True):
            given[i] = own.expand(args[i].shape)
        self.outputs = self.record(lambda: list(call(*given)))

    def replay(self, args: Sequence[Any], launched: Callable[[], None] | None = None) -> list[Any]:
        """Run with other small inputs; the results are the caller's own.

        launched: to be called as soon as the graph is on its way.
        """
        self.wait()
        for own, i in zip(self.inputs, self.copied, strict=True):
            own.copy_(core(args[i]), non_blocking=True)
        self.launch()
        if launched is not None:
            launched()
        return [o.clone() if isinstance(o, Tensor) else o for o in self.outputs]

    def record(self, run: Callable[[], list[Any]]) -> list[Any]:
        """Capture ``run`` and return its results, which every launch writes anew."""
        self.graph = torch.cuda.CUDAGraph()
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                results = _captured(self.graph, run)
        except Exception:
            # After a capture that broke, torch's generator believes that it goes on: end another.
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                _captured(torch.cuda.CUDAGraph(), list)
            raise
        current.wait_stream(stream)
        self.last = current
        return results

    def wait(self) -> None:
        """Begin on this stream when the replay before has ended on its own."""
        current = torch.cuda.current_stream(self.device)
        if current != self.last:
            current.wait_stream(self.last)
            self.last = current

    def launch(self) -> None:
        """Replay."""
        self.graph.replay()


def _captured(graph: torch.cuda.CUDAGraph, run: Callable[[], list[Any]]) -> list[Any]:
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        return run()
    finally:
        graph.capture_end()


def core(x: Tensor) -> Tensor:
    """``x`` with each of its numbers once: one place of each dimension that is expanded."""
    for dim, step in enumerate(x.stride()):
        if step == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def twin(x: Tensor) -> Tensor:
    """A copy with the strides of ``x``."""
    inner = core(x)
    own = torch.empty_strided(inner.shape, inner.stride(), dtype=x.dtype, device=x.device)
    return own.copy_(inner).expand(x.shape)
