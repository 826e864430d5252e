"""Codes by kind that have tiers, drop visual tokens and keep a share of the tokens exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apack_compile.codec import ModalLayout, TransformLayout, parse_layout
from apack_compile.codec.evicting import evicting
from apack_compile.codec.fit_modal import FULL, fit_modal
from apack_compile.codec.kinds import TEXT, VISUAL
from apack_compile.codec.layout import KEPT_OF, PARTS
from apack_compile.codec.modal import modal
from apack_compile.codec.recipe import Recipe
from apack_compile.codec.tiered import TIERS, layout_of

from ..helpers import few, hand_code
from .test_modal import evidence

SHAPE = (2, 16, 1)


def code(
    counts: tuple[int, int, int], shares: tuple[int, ...] = (), **more: int
) -> TransformLayout:
    evicted = more.pop("evicted", 0)
    return evicting(replace(layout_of(SHAPE, counts, True, shares), **more), evicted)


LAYOUTS = {
    "tiers": modal(code((0, 16, 16), TIERS), code((16, 16, 0), TIERS)),
    "tiers of text": modal(code((0, 16, 16)), code((16, 16, 0), (16, 4))),
    "tiers of images": modal(code((0, 16, 16), (9,)), code((16, 16, 0))),
    "evict": modal(code((0, 16, 16), evicted=10), code((16, 16, 0))),
    "exact": modal(code((0, 16, 16), exact=20), code((16, 16, 0), exact=20)),
    "all": modal(
        code((0, 16, 16), TIERS, evicted=10, exact=20), code((16, 16, 0), (16, 4), exact=20)
    ),
}  # fmt: skip
every_layout = pytest.mark.parametrize("name", LAYOUTS)


@every_layout
def test_the_layout_says_what_it_stores(name: str) -> None:
    layout = LAYOUTS[name]
    assert parse_layout(layout.spec) == layout
    assert modal(layout.visual, layout.text) == layout
    fields = layout.payload_fields(torch.float16)
    assert fields[0] == (1, torch.uint8) and layout.tokenwise == 1
    planes = len(fields) - 1
    for each in (layout.shares, layout.later_shares, layout.plane_kinds, layout.plane_levels):
        assert len(each) == planes
    for kind, code_ in ((VISUAL, layout.visual), (TEXT, layout.text)):
        levels = bool(code_.shares)  # one byte says kind and level
        wanted = 1 + code_.token_bytes(torch.float16) - levels
        assert layout.token_bytes(torch.float16, kind) == pytest.approx(wanted)
        own = [
            width * dtype.itemsize * share / PARTS
            for (width, dtype), share, of in zip(
                fields[1:], layout.shares, layout.plane_kinds, strict=True
            )
            if of == kind
        ]
        assert 1 + sum(own) == pytest.approx(wanted)
    assert (layout.evicts, layout.kept) == (layout.visual.evicts, layout.text.kept)
    assert layout.dropped_level == (len(layout.text.shares) + 1 if layout.evicts else None)
    assert layout.tracks_importance == bool(layout.text.tier_shares)
    assert layout.weighs == (name != "exact")


def test_levels_of_all() -> None:
    layout = LAYOUTS["all"]
    levels = torch.arange(10, dtype=torch.uint8)[None]  # text 0 .. 2; visual 0, then 2 .. 6
    assert layout.first_levels == (0, 3)
    assert layout.kinds_of(levels).tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]]
    assert layout.lacks(levels)[0, [0, 1, 2, 3, 5, 6, 7, 8, 9]].tolist() == [
        2, 1, 0, -1, 4, 3, 2, 1, 0
    ]  # fmt: skip
    assert layout.plane_levels == (
        (4, 9), (5, 9), (6, 9), (7, 9), (8, 9), (9, 9),  # codes, gains, four planes
        (0, 2), (0, 2), (1, 2), (2, 2),
    )  # fmt: skip
    assert layout.shares[:2] == (22, 22) and layout.shares[6:] == (32, 32, 16, 4)
    assert layout.later_shares == (0,) * 6 + (32, 32, 16, 4)
    assert layout.later_steps == (16, 4)


@every_layout
@given(tokens=st.integers(1, 9), batch=st.integers(1, 3), seed=st.integers(0, 99))
@few
def test_tokens_are_those_of_the_right_code_at_their_level(
    name: str, tokens: int, batch: int, seed: int
) -> None:
    """Against the code of each kind alone; scores and mix against what is decoded."""
    made = hand_code(LAYOUTS[name])
    layout, params = LAYOUTS[name], [p.double() for p in made.params]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 2, tokens, 16, dtype=torch.float64, generator=generator)
    kinds = torch.randint(2, (batch, tokens), generator=generator)
    want, levels = torch.zeros_like(x), torch.zeros(batch, tokens, dtype=torch.uint8)
    for kind, inner in enumerate(layout.by_kind):
        steps = len(inner.shares)
        first = steps - len(inner.tier_shares) if inner.evicts else 0
        own = torch.randint(first, steps + 1, (batch, tokens), generator=generator)
        if inner.evicts:  # dropped, or at least in the planes of all that stay
            own = torch.where(torch.rand(batch, tokens, generator=generator) < 0.3, 0, own)
        own = own.to(torch.uint8)
        mine = layout.parts(params)[kind]
        alone = inner.decode(inner.encode(x, mine, None, own), mine, x.dtype)
        here = kinds == kind
        want = torch.where(here[:, None, :, None], alone, want)
        levels = torch.where(here, own + layout.first_levels[kind], levels)
    payload = layout.encode(x, params, None, levels)
    assert torch.equal(payload[0][..., 0], levels)
    assert torch.equal(layout.kinds_of(levels).long(), kinds)
    assert torch.equal(layout.decode(payload, params, x.dtype), want)
    absent = layout.absent(payload)
    gone = torch.zeros(batch, tokens, dtype=torch.bool) if absent is None else absent
    assert torch.equal(gone, layout.lacks(levels) < 0)
    seen = ~gone[:, None, None]
    q = torch.randn(batch, 4, 3, 16, dtype=torch.float64, generator=generator)
    every = want.repeat_interleave(2, 1)
    scores = torch.where(seen, layout.scores(q, payload, params), 0.0)
    wanted = torch.where(seen, q @ every.mT, 0.0)
    torch.testing.assert_close(scores, wanted, rtol=1e-10, atol=1e-10)
    p = torch.where(seen, torch.rand(batch, 4, 3, tokens, dtype=torch.float64), 0.0)
    torch.testing.assert_close(layout.mix(p, payload, params), p @ every, rtol=1e-10, atol=1e-10)


@every_layout
def test_each_token_is_judged_by_its_own_code(name: str) -> None:
    made, layout = hand_code(LAYOUTS[name]), LAYOUTS[name]
    x = torch.randn(2, 2, 6, 16)
    top = layout.first_levels[VISUAL] + len(layout.visual.shares)
    levels = torch.tensor([[0, top, 0, top, top, 0]] * 2, dtype=torch.uint8)
    _, judged = layout.encode_and_judge(x, made.params, None, levels)
    assert judged is not None
    for kind, inner in enumerate(layout.by_kind):
        mine = layout.parts(made.params)[kind]
        own = torch.full((2, 6), len(inner.shares) if kind == VISUAL else 0, dtype=torch.uint8)
        _, alone = inner.encode_and_judge(x, mine, None, own)
        assert alone is not None
        here = layout.kinds_of(levels) == kind
        for a, b in zip(judged, alone, strict=True):
            torch.testing.assert_close(a[here], b[here])


def test_text_is_not_dropped() -> None:
    dropping = code((16, 16, 0), evicted=4)
    with pytest.raises(ValueError, match="differ in more than"):
        modal(code((0, 16, 16)), dropping)


@pytest.mark.parametrize(
    "more",
    [{"tiers": True}, {"evict": 0.3}, {"exact_share": 0.01},
     {"tiers": True, "evict": 0.3, "exact_share": 0.01, "k_code": "post-rope"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize(("visual", "text"), [(16.0, 2.0), (8.0, 4.0)])
def test_each_kind_has_the_bytes_that_its_ratio_leaves(
    visual: float, text: float, measured: bool, more: dict[str, object]
) -> None:
    recipe = Recipe(text, visual_ratio=visual, **more)  # type: ignore[arg-type]
    layers = [evidence(700, 700, measured, seed) for seed in range(3)]
    codes = fit_modal(layers, (32, 32), recipe, 0)
    dense = 2 * 2 * 128
    for kind, ratio in ((VISUAL, visual), (TEXT, text)):
        spent = 0.0
        for k, v in codes:
            assert isinstance(k.layout, ModalLayout) and isinstance(v.layout, ModalLayout)
            for layout in (k.layout, v.layout):
                spent += layout.token_bytes(torch.float16, kind)
                spent += 2 * 128 * layout.kept / KEPT_OF
        assert ratio <= len(layers) * dense / spent < 1.4 * ratio
    for k, v in codes:
        assert isinstance(k.layout, ModalLayout) and isinstance(v.layout, ModalLayout)
        assert k.layout.evicts == v.layout.evicts == recipe.evicted
        assert k.layout.kept == v.layout.kept == recipe.kept
        assert bool(v.layout.visual.tier_shares) == recipe.tiers
        assert bool(v.layout.text.tier_shares) == (recipe.tiers and text > FULL)
        assert not k.layout.tier_shares and not v.layout.text.evicts


def test_tiers_go_by_the_ratio_of_the_tokens_that_stay() -> None:
    """Bug: with a share dropped, others could not spend their bytes on tiers at a ratio of 3."""
    for visual, evict, tiered in ((3.0, 0.3, False), (3.0, 0.0, True), (5.0, 0.3, True)):
        recipe = Recipe(4, visual_ratio=visual, tiers=True, evict=evict)
        ((_, v),) = fit_modal([evidence(700, 700)], (32, 32), recipe, 0)
        assert isinstance(v.layout, ModalLayout)
        assert bool(v.layout.visual.tier_shares) == tiered


def test_tiers_would_leave_bytes_over_where_all_tokens_may_have_all_bits() -> None:
    """With tiers, eight bits of every component take less than half of 16, so nothing is gained."""
    assert 2 < FULL < 3
    layers = [evidence(700, 700)]
    for text in (2.0, FULL):
        plain, tiered = (
            fit_modal(layers, (32, 32), Recipe(text, visual_ratio=16, tiers=tiers), 0)[0][1]
            for tiers in (False, True)
        )
        assert isinstance(plain.layout, ModalLayout) and isinstance(tiered.layout, ModalLayout)
        assert plain.layout.text == tiered.layout.text
        assert plain.layout.visual != tiered.layout.visual
