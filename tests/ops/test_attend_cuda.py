from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from apack_compile.codec import ExactLayout, TransformLayout
from apack_compile.ops import attend_cuda, encode_cuda

SPEC = ExactLayout(2, 64).spec


def test_without_triton_attention_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(1, 4, 1, 64, dtype=torch.bfloat16, device="cuda")
        assert attend_cuda.by_kernels(q, SPEC, SPEC)
        for module in (attend_cuda, encode_cuda):
            monkeypatch.setattr(module, "_launch", lambda: None)
        assert not attend_cuda.by_kernels(q, SPEC, SPEC)
        assert encode_cuda.encode_kernels(q, ExactLayout(4, 64)) is None


@pytest.mark.parametrize(
    ("queries", "dtype"), [(17, torch.bfloat16), (1, torch.float32)], ids=["many", "float32"]
)
def test_what_the_kernels_do_not_take_is_plain(queries: int, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        q = torch.empty(1, 4, queries, 64, dtype=dtype, device="cuda")
        assert not attend_cuda.by_kernels(q, SPEC, SPEC)


def test_keys_coded_before_their_rotation_are_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("apack_compile.kernels.triton.launch")
    monkeypatch.setattr(launch, "shared_memory", lambda _: 227 << 10)
    value = TransformLayout(2, 64, 1, 16, 32, 16, 1)
    key = replace(value, gain=0, rotary=64)
    with FakeTensorMode():
        q = torch.empty(1, 4, 1, 64, dtype=torch.bfloat16, device="cuda")
        assert attend_cuda.by_kernels(q, key.spec, value.spec)
        assert attend_cuda.by_kernels(q, replace(key, exact=3).spec, value.spec)
        assert not attend_cuda.by_kernels(q.float(), key.spec, value.spec)
        assert encode_cuda.encode_kernels(q, key) is not None
        assert encode_cuda.encode_kernels(q, replace(key, exact=3)) is None


def test_an_environment_that_asks_for_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("APACK_ATTEND", "fast")
    with pytest.raises(ValueError, match="APACK_ATTEND='fast': accepted are triton_op, plain"):
        attend_cuda.choice()
