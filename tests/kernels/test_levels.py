"""Levels of the tokens of a prompt, kind by kind, and the planes that they fill."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apack_compile.cache import Policy
from apack_compile.codec import Layout, ModalLayout
from apack_compile.codec.evicting import evicting
from apack_compile.codec.kinds import VISUAL
from apack_compile.codec.modal import modal
from apack_compile.codec.tiered import TIERS, layout_of
from apack_compile.kernels.kinds import sort_tokens
from apack_compile.kernels.levels import prompt_levels
from apack_compile.kernels.planes import members, quotas, spread, token_levels

from ..helpers import few, hand_code

SHAPE = (2, 8, 1)
VISUALS = layout_of(SHAPE, (0, 8, 8), True, TIERS)
TEXTS = layout_of(SHAPE, (8, 8, 0), True, (16, 4))
PLAIN = replace(layout_of(SHAPE, (8, 8, 0), True))
LAYOUTS: dict[str, ModalLayout] = {
    "tiers": modal(VISUALS, TEXTS),
    "tiers of text": modal(PLAIN, TEXTS),
    "evict": modal(evicting(PLAIN, 10), PLAIN),
    "both": modal(evicting(VISUALS, 10), TEXTS),
}
every_layout = pytest.mark.parametrize("name", LAYOUTS)


def levels_of(layout: Layout, importance: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    x = torch.randn(*importance.shape, 2, 8).transpose(1, 2)
    seen = importance >= 0
    found = prompt_levels(x, None, seen, importance, layout, 0, kinds)
    assert found is not None
    return found


@every_layout
@given(batch=st.integers(1, 3), tokens=st.integers(1, 80), seed=st.integers(0, 99))
@few
def test_tokens_compete_with_those_of_their_kind_alone(
    name: str, batch: int, tokens: int, seed: int
) -> None:
    layout = LAYOUTS[name]
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(batch, tokens, generator=generator)
    importance[:, : tokens // 5] = -1.0  # padding
    kinds = torch.randint(2, (batch, tokens), generator=generator).to(torch.uint8)
    levels = levels_of(layout, importance, kinds)
    assert torch.equal(layout.kinds_of(levels), kinds)
    for row in range(batch):
        for kind, inner in enumerate(layout.by_kind):
            mine = kinds[row] == kind
            if not mine.any():
                continue
            own = importance[row, mine][None]
            want = token_levels(own, inner.shares)[0] + layout.first_levels[kind]
            assert torch.equal(levels[row, mine], want)


def test_sinks_that_are_visual_take_no_row_from_others() -> None:
    layout = LAYOUTS["evict"]
    x = torch.randn(1, 2, 32, 8)
    importance = torch.arange(32).float()[None].flip(1)  # the sinks receive most
    kinds = torch.ones(1, 32, dtype=torch.uint8)
    seen = torch.ones(1, 32, dtype=torch.bool)
    levels = prompt_levels(x, None, seen, importance, layout, 4, kinds)
    assert levels is not None
    dropped = levels == layout.dropped_level
    assert dropped[0, :4].all() and int((~dropped).sum()) == -(-22 * 28 // 32)
    assert not dropped[0, 4:20].any()


@every_layout
@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 120), window=st.integers(0, 20),
    share=st.sampled_from([0.0, 0.3, 0.7, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
@few
def test_every_row_of_a_prompt_is_in_its_planes(
    name: str, batch: int, tokens: int, window: int, share: float, seed: int
) -> None:
    """What is stored, spread again, is what was coded, for every token in every plane it is in."""
    layout, policy = LAYOUTS[name], Policy(2, 4, window, 16, 16)
    code = hand_code(layout)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 2, tokens, 8, generator=generator)
    visual = torch.rand(batch, tokens, generator=generator) < share
    importance = torch.rand(batch, tokens, generator=generator)
    coded = max(tokens - window, 0)
    kinds = sort_tokens(visual, coded, policy.chunk)
    made = torch.ops.apack.encode(
        x, None, list(code.params), layout.spec, policy.sinks, policy.extra, policy.window,
        policy.ring, policy.chunk, importance, kinds.tensors(x.device),
    )  # fmt: skip
    payload = made[: len(layout.payload_fields(x.dtype))]
    levels = payload[0][:, :coded, 0]
    assert torch.equal(layout.kinds_of(levels) == VISUAL, visual[:, :coded])
    whole = layout.encode(x[:, :, :coded], code.params, None, levels)
    back = spread(payload, layout)
    rows = quotas(layout, coded, kinds=kinds.counts)
    for plane, (want, got) in enumerate(zip(whole[1:], back[1:], strict=True), 1):
        has = members(layout, levels, plane)
        assert torch.equal(got[:, :coded][has], want[has])
        assert int(has.sum(1).max()) <= rows[plane - 1] <= payload[plane].shape[1]
        assert payload[plane].shape[1] % policy.chunk == 0
