"""What Inductor writes for a decode step, and when it is served from its cache."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code

from apack_compile import PackedKV, source_hash
from apack_compile.ops import library  # noqa: F401  (registers the operators)

from .passes.capture import grown, packed, repeat_kv, tokens


def step(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, mask: Tensor) -> Any:
    """As a layer of transformers has it."""
    keys, values = grown(pk, pv, k, v)
    out = F.scaled_dot_product_attention(q * 2, repeat_kv(keys), repeat_kv(values), mask)
    return out, keys, values


def arguments(length: int = 300) -> tuple[Tensor, ...]:
    mask = torch.ones(2, 1, 1, length + 1, dtype=torch.bool)
    return tokens(1, 4), tokens(1), tokens(1), packed(length), packed(length), mask


@pytest.fixture
def _caches() -> Iterator[None]:
    with fresh_cache():
        counters.clear()
        yield


def compiled(**settings: Any) -> Any:
    return torch.compile(step, backend="attentionpack", **settings)


def test_a_decode_step_has_no_dense_keys_and_no_copies_of_codes() -> None:
    uncached = {"inductor": {"fx_graph_cache": False}}
    _, sources = run_and_get_code(compiled(options=uncached), *arguments())
    (graph,) = (s for s in sources if "apack.attend_region" in s)
    called = set(re.findall(r"torch\.ops\.(\w+\.\w+)", graph))
    assert called == {"apack.attend_region", "apack.score_bias", "inductor._alloc_from_pool"}
    sizes = [eval(made) for made in re.findall(r"empty_strided_cpu\((\([^()]*\))", graph)]
    assert max(math.prod(size) for size in sizes) < 2 * 2 * 300, "as large as one of the caches"


def served() -> tuple[int, int]:
    return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]


@pytest.mark.usefixtures("_caches")
def test_the_cache_serves_the_same_code_and_not_that_of_other_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cache is on disk: another process starts like one that has forgotten all it compiled."""
    args = arguments()
    compiled()(*args)
    hits, misses = served()
    assert hits == 0 and misses
    torch._dynamo.reset()
    again = compiled()
    again(*arguments())
    assert served()[0] > 0 and served()[1] == misses
    torch._dynamo.reset()
    hits = served()[0]
    monkeypatch.setattr(source_hash, "source_hash", lambda: "a kernel was edited")
    compiled()(*arguments())
    assert served()[0] == hits and served()[1] > misses


def test_the_hash_reads_every_source_of_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apack_compile import kernels

    source_hash.source_hash.cache_clear()
    before = source_hash.source_hash()
    read = Path.read_bytes
    edited = Path(str(kernels.__file__)).parent / "triton" / "over_codes.py"
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: read(self) + b"#" * (self.resolve() == edited.resolve())
    )
    source_hash.source_hash.cache_clear()
    assert source_hash.source_hash() != before
    source_hash.source_hash.cache_clear()


def test_autotuning_gives_the_same() -> None:
    args = arguments(40)
    expected = step(*[a.unpack() if isinstance(a, PackedKV) else a for a in args])[0]
    out = compiled(mode="max-autotune")(*args)[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
