"""Rings of many caches coded by one real CUDA graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apack_compile.cache import Policy, SideStore
from apack_compile.codec import Code, CodeRef
from apack_compile.runtime.flush import Flush

from ..helpers import fitted_ref, pair_waves

pytestmark = pytest.mark.gpu

POLICY = Policy(window=16, block=16, chunk=64)


def stores(inference: bool) -> list[SideStore]:
    refs = [fitted_ref(gain=False), fitted_ref(gain=True)]
    layout = replace(refs[0].layout, rotary=refs[0].layout.dim)
    refs.append(CodeRef(Code(layout, (*refs[0].code.params, pair_waves(layout)))))
    generator = torch.Generator("cuda").manual_seed(0)
    heads, dim = refs[0].layout.heads, refs[0].layout.dim
    with torch.inference_mode(inference):
        return [
            SideStore.encode(
                torch.randn(3, heads, 300, dim, device="cuda", generator=generator).bfloat16(),
                ref, POLICY,
            )
            for ref in refs * 2
        ]  # fmt: skip


@pytest.mark.parametrize("inference", [False, True])
def test_one_graph_codes_as_one_store_after_the_other(inference: bool) -> None:
    together, alone, flush = stores(inference), stores(inference), Flush(capture=True)
    for step in range(300):
        generator = torch.Generator("cuda").manual_seed(step)
        flush(together, [1] * len(together))
        for one, two in zip(together, alone, strict=True):
            two.reserve(1)
            shape = (*one.side.ring.shape[:2], 1, one.side.ring.shape[3])
            new = torch.randn(shape, device="cuda", generator=generator).bfloat16()
            if step == 40:
                new[1] = float("nan")
            with torch.inference_mode(inference):
                for store in (one, two):
                    store.side.ring[:, :, store.recent : store.recent + 1] = new
            one.advance(1)
            two.advance(1)
    for one, two in zip(together, alone, strict=True):
        assert (one.coded, one.length) == (two.coded, two.length) and one.coded > 500
        for mine, right in zip(one.tensors(), two.tensors(), strict=True):
            assert torch.equal(mine.nan_to_num(7.0), right.nan_to_num(7.0))
        torch.testing.assert_close(one.tally, two.tally)
    (call,) = flush._calls.values()
    assert not call.reason and 1 <= call.captures < call.calls
