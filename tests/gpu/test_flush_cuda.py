"""Rings of many caches coded by one real CUDA graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apack_compile.cache import Policy, SideStore
from apack_compile.codec import Code, CodeRef
from apack_compile.codec.fixed import fixed_ref
from apack_compile.runtime.flush import Flush

from ..helpers import fitted_ref, modal_ref, pair_waves

pytestmark = pytest.mark.gpu

POLICY = Policy(window=16, block=16, chunk=64)


def refs_of(name: str) -> list[CodeRef]:
    """Codes that kernels know, and codes that plain operators make."""
    refs = [fitted_ref(gain=False), fitted_ref(gain=True)]
    if name == "kernels":
        layout = replace(refs[0].layout, rotary=refs[0].layout.dim)
        return [*refs, CodeRef(Code(layout, (*refs[0].code.params, pair_waves(layout))))]
    kept = [CodeRef(Code(replace(r.layout, exact=50), r.code.params)) for r in refs]
    return [
        *kept, fitted_ref(ratio=2, tiers=True), fitted_ref(ratio=2, tiers=True, evict=0.3),
        modal_ref(gain=False, evict=0.3), modal_ref(ratio=3, tiers=True, evict=0.3),
        fixed_ref("int8", 2, 8), refs[1],
    ]  # fmt: skip


def stores(name: str, inference: bool) -> list[SideStore]:
    refs = refs_of(name)
    generator = torch.Generator("cuda").manual_seed(0)
    heads, dim = refs[0].layout.heads, refs[0].layout.dim
    with torch.inference_mode(inference):
        return [
            SideStore.encode(
                torch.randn(3, heads, 300, dim, device="cuda", generator=generator).bfloat16(),
                ref, POLICY, visual=torch.arange(300, device="cuda").expand(3, -1) < 100,
            )
            for ref in refs * 2
        ]  # fmt: skip


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", ["kernels", "options"])
def test_one_graph_codes_as_one_store_after_the_other(name: str, inference: bool) -> None:
    together, alone = stores(name, inference), stores(name, inference)
    flush = Flush(capture=True)
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
                    if store.importance is not None:
                        store.importance[:, store.recent] = new.float().abs().amax((1, 2, 3))
            one.advance(1)
            two.advance(1)
    for one, two in zip(together, alone, strict=True):
        assert (one.coded, one.length) == (two.coded, two.length) and one.coded > 500
        assert one.rows == two.rows
        for mine, right in zip(one.owned(), two.owned(), strict=True):
            assert torch.equal(mine.nan_to_num(7.0), right.nan_to_num(7.0))
        torch.testing.assert_close(one.tally, two.tally)
    (call,) = flush._calls.values()
    assert not call.reason and 1 <= call.captures < call.calls
