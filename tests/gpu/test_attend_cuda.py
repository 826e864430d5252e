"""Packed attention inside a graph that Inductor compiles for CUDA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from torch._inductor.utils import run_and_get_code

from ..kernels.test_triton_attend import case, transform

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_graph_launches_our_kernels(
    masked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APACK_ATTEND", "triton_op")
    given = case(transform(), transform(gain=1), length=200, dtype=dtype)
    specs = [code.layout.spec for code in given["codes"]]
    q, lengths = given["q"].cuda(), given["lengths"].cuda()
    k, v = ([t.cuda() for t in given[side]] for side in "kv")
    mask = torch.rand(2, 1, 1, 200, device="cuda") < 0.8 if masked else None

    def attend(q: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
        return torch.ops.apack.attend(q * 2, mask, k, v, lengths, 0.125, *specs)

    out, (code,) = run_and_get_code(torch.compile(attend), q, k, v)
    for kernel in ("fold_kernel", "attend_kernel", "merge_kernel"):
        assert f"{kernel}_" in code
    assert "ops.apack.attend" not in code
    assert torch.equal(out, torch.compile(attend)(q, k, v))
    monkeypatch.setenv("APACK_ATTEND", "plain")
    plain = attend(q, k, v)
    error = (out.double() - plain.double()).norm() / plain.double().norm()
    assert error < torch.finfo(dtype).eps


def test_scores_that_rise_late_fit_float16_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: in graphs, ``SHIFT`` of the programs over codes was that of the other programs."""
    monkeypatch.setenv("APACK_ATTEND", "triton_op")
    given = case(transform(), transform(gain=1), batch=4, length=9000)
    specs = [code.layout.spec for code in given["codes"]]
    q, lengths = 16 * given["q"].cuda(), given["lengths"].cuda()
    k, v = ([t.cuda() for t in given[side]] for side in "kv")

    def attend(q: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
        return torch.ops.apack.attend(q, None, k, v, lengths, 0.125, *specs)

    out, eager = torch.compile(attend)(q, k, v), attend(q, k, v)
    assert eager.isfinite().all()
    assert (out.double() - eager.double()).norm() < torch.finfo(out.dtype).eps * eager.norm()
