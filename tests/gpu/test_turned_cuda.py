"""Keys coded before their rotary embedding, inside graphs that Inductor compiles for CUDA."""

from __future__ import annotations

import pytest
import torch
import transformers

pytest.importorskip("triton", reason="Triton is not installed")

import apack_compile
from apack_compile.ops.attend_cuda import by_kernels

from .. import zoo
from ..kernels.test_triton_attend import case, transform
from ..kernels.test_triton_turned import keys
from .graphs import attended
from .test_cuda import generate, on_device

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_graph_launches_our_kernel_and_makes_no_dense_keys(
    interleaved: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = case(keys(64, interleaved), transform(gain=1), length=20_000, dtype=dtype)
    found = attended(given, monkeypatch)
    for kernel in ("basis_kernel", "attend_kernel", "merge_kernel"):
        assert f"{kernel}_" in found.code
    assert "fold_kernel_" not in found.code and "ops.apack.attend" not in found.code
    assert "extern_kernels." not in found.code
    dense = 2 * 2 * 20_000 * 64 * dtype.itemsize  # of the keys alone
    assert found.peak < dense / 4
    assert found.error < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_decodes_by_kernels(dtype: torch.dtype) -> None:
    """Left padding, rings coded on the way, captured steps."""
    case = on_device(zoo.llama(2, True, text=300), dtype)
    options = {"ratio": 4, "k_code": "pre-rope", "window": 16, "profile_cache": False}
    compiled = torch.compile(case.model, backend="attentionpack", options=options)
    for _ in range(2):  # learns, then encodes in the graph
        cache = generate(compiled, case).past_key_values
    specs = [side.store.ref.layout.spec for side in (cache.layers[0].keys, cache.layers[0].values)]
    layer = cache.layers[0].keys
    assert layer.store.ref.layout.positional
    q = torch.empty(2, layer.store.ref.layout.heads, 1, 1, dtype=dtype, device=layer.device)
    assert by_kernels(q, *specs)
    dense = transformers.DynamicCache()
    for number, each in enumerate(cache.layers):
        dense.update(each.keys.unpack(), each.values.unpack(), number)
    token = torch.tensor([[20], [30]], device=layer.device)
    got = compiled(input_ids=token, past_key_values=cache).logits
    with torch.compiler.set_stance("force_eager"):
        want = case.model(input_ids=token, past_key_values=dense).logits
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < 4 * torch.finfo(dtype).eps, f"relative error {error:.2e}"
    assert apack_compile.report(case.model).recompiles == 0
