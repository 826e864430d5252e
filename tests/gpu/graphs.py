"""Packed attention in a graph of its own, which Inductor compiles for CUDA."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code


class Attended(NamedTuple):
    """What came of it.

    Attributes:
        out: by kernels.
        plain: by plain operators, outside of a graph.
        code: of the graph.
        peak: bytes that a step takes beside its arguments.
    """

    out: Tensor
    plain: Tensor
    code: str
    peak: int

    @property
    def error(self) -> float:
        """Relative to the plain operators."""
        plain = self.plain.double()
        return float((self.out.double() - plain).norm() / plain.norm())


def attended(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Attended:
    """Attention over a case of the kernels' tests; twice, with the same result to the bit."""
    monkeypatch.setenv("APACK_ATTEND", "triton_op")
    specs = [code.layout.spec for code in given["codes"]]
    q, lengths = given["q"].cuda(), given["lengths"].cuda()
    k, v = ([t.cuda() for t in given[side]] for side in "kv")

    def attend(q: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
        return torch.ops.apack.attend(q * 2, None, k, v, lengths, 0.125, *specs)

    compiled = torch.compile(attend)
    out, (code,) = run_and_get_code(compiled, q, k, v)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert torch.equal(out, compiled(q, k, v))
    peak = torch.cuda.max_memory_allocated() - before
    monkeypatch.setenv("APACK_ATTEND", "plain")
    return Attended(out, attend(q, k, v), code, peak)
