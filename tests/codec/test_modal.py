"""Two codes side by side: each token is what the code of its kind makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apack_compile.codec import Code, ModalLayout, TransformLayout, parse_layout
from apack_compile.codec.fit import Evidence, fit_transform
from apack_compile.codec.fit_modal import fit_modal
from apack_compile.codec.kinds import balance, least_tokens, of_kind, rest
from apack_compile.codec.modal import TEXT, VISUAL, joined, modal
from apack_compile.codec.moments import Moments
from apack_compile.codec.recipe import Recipe
from apack_compile.codec.sensitivity import Sensitivity
from apack_compile.codec.tiered import layout_of
from apack_compile.kernels.reference import decode_reference

from ..helpers import few, hand_code

SHAPE = (2, 16, 1)
VISUALS = {
    "keys": layout_of(SHAPE, (0, 0, 16), False),
    "values": layout_of(SHAPE, (0, 16, 16), True),
    "another group": layout_of((2, 16, 2), (0, 0, 16), True),
}
TEXTS = {
    "keys": layout_of(SHAPE, (32, 0, 0), False),
    "values": layout_of(SHAPE, (16, 16, 0), True),
    "another group": layout_of(SHAPE, (16, 16, 0), False),
}
every_code = pytest.mark.parametrize("name", VISUALS)


def layout_named(name: str, rotary: int = 0) -> ModalLayout:
    return modal(*(replace(codes[name], rotary=rotary) for codes in (VISUALS, TEXTS)))


@every_code
def test_the_layout_says_what_it_stores(name: str) -> None:
    layout = layout_named(name)
    visual, text = layout.visual, layout.text
    assert (visual, text) == (VISUALS[name], TEXTS[name])
    assert parse_layout(layout.spec) == layout
    assert layout.param_count == visual.param_count + text.param_count
    fields = [layout_.payload_fields(torch.float16) for layout_ in (visual, text)]
    assert layout.payload_fields(torch.float16) == ((1, torch.uint8), *fields[0], *fields[1])
    assert layout.tokenwise == 1
    assert layout.plane_kinds == (VISUAL,) * len(fields[0]) + (TEXT,) * len(fields[1])
    assert len(layout.shares) == len(layout.later_shares) == len(layout.plane_kinds)
    for kind, code in ((VISUAL, visual), (TEXT, text)):
        assert layout.token_bytes(torch.float16, kind) == 1 + code.token_bytes(torch.float16)
    assert layout.tier_shares == () and layout.evicts == layout.kept == 0


def test_codes_that_differ_in_more_are_not_joined() -> None:
    plain = layout_of(SHAPE, (16, 0, 0), False)
    for other in (replace(plain, rotary=16), replace(plain, exact=3), replace(plain, dim=8)):
        with pytest.raises(ValueError, match="differ in more than"):
            modal(other, plain)


@every_code
@given(tokens=st.integers(1, 9), batch=st.integers(1, 3), share=st.floats(0, 1))
@few
def test_tokens_are_those_of_the_right_code(
    name: str, tokens: int, batch: int, share: float
) -> None:
    """Decoded, against the float64 oracle; scores and mix against what is decoded."""
    code = hand_code(layout_named(name))
    params = [p.double() for p in code.params]
    x = torch.randn(batch, 2, tokens, 16, dtype=torch.float64)
    kinds = (torch.rand(batch, tokens) < share).to(torch.uint8)
    payload = code.layout.encode(x, params, None, kinds)
    assert torch.equal(payload[0][..., 0], kinds)
    got = code.layout.decode(payload, params, x.dtype)
    torch.testing.assert_close(
        got, decode_reference(code.layout, payload, params), rtol=1e-12, atol=1e-12
    )
    assert isinstance(code.layout, ModalLayout)
    inner = code.layout.visual, params[: code.layout.visual.param_count]
    outer = code.layout.text, params[code.layout.visual.param_count :]
    for kind, (layout, mine) in ((VISUAL, inner), (TEXT, outer)):
        alone = layout.decode(layout.encode(x, mine), mine, x.dtype)
        here = (kinds == kind)[:, None, :, None]
        assert torch.equal(torch.where(here, got, 0), torch.where(here, alone, 0))
    q = torch.randn(batch, 4, 3, 16, dtype=torch.float64)
    every = got.repeat_interleave(2, 1)
    scores = code.layout.scores(q, payload, params)
    torch.testing.assert_close(scores, q @ every.mT, rtol=1e-10, atol=1e-10)
    p = torch.rand(batch, 4, 3, tokens, dtype=torch.float64)
    torch.testing.assert_close(
        code.layout.mix(p, payload, params), p @ every, rtol=1e-10, atol=1e-10
    )


def test_keys_before_their_rotation_are_read_where_they_were() -> None:
    code = hand_code(layout_named("keys", rotary=16))
    params = list(code.params)
    x, places = torch.randn(1, 2, 6, 16), torch.arange(6)[None] + 3
    kinds = torch.tensor([[0, 1, 1, 0, 1, 0]], dtype=torch.uint8)
    payload = code.layout.encode(x, params, places, kinds)
    got = code.layout.decode(payload, params, x.dtype, places)
    assert isinstance(code.layout, ModalLayout) and code.layout.positional
    count = code.layout.visual.param_count
    both = (code.layout.text, params[count:]), (code.layout.visual, params[:count])
    alone = [a.decode(a.encode(x, p, places), p, x.dtype, places) for a, p in both]
    assert torch.equal(got, torch.where(kinds[:, None, :, None] == 1, alone[1], alone[0]))
    q = torch.randn(1, 2, 2, 16)
    torch.testing.assert_close(code.layout.scores(q, payload, params, places), q @ got.mT)


@every_code
def test_tokens_of_no_kind_are_text(name: str) -> None:
    code = hand_code(layout_named(name))
    x = torch.randn(1, 2, 5, 16)
    payload = code.layout.encode(x, code.params)
    assert not payload[0].any()
    assert isinstance(code.layout, ModalLayout)
    params = code.params[code.layout.visual.param_count :]
    alone = code.layout.text.decode(code.layout.text.encode(x, params), params, x.dtype)
    assert torch.equal(code.layout.decode(payload, code.params, x.dtype), alone)


def tokens(count: int, seed: int, heads: int = 4, dim: int = 32) -> Tensor:
    """``[1, H, T, D]`` with a mean and principal directions of its own."""
    generator = torch.Generator().manual_seed(seed)
    n = heads * dim
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    mean = torch.randn(n, generator=generator)
    x = torch.randn(count, n, generator=generator) * torch.exp(-0.03 * torch.arange(n)) @ basis
    return (x + mean).view(1, count, heads, dim).transpose(1, 2)


def evidence(text: int, visual: int, measured: bool = False, seed: int = 0) -> Evidence:
    x = torch.cat([tokens(visual, seed + 1), tokens(text, seed + 2)], 2)
    seen = torch.arange(x.shape[2])[None] < visual
    sense = None
    if measured:
        blocks = torch.eye(32, dtype=torch.float64).expand(4, 32, 32) * (1 + seed)
        sense = Sensitivity(blocks, blocks)
    total, images = Moments.of(x, x, x, None), Moments.of(x, x, x, None, among=seen)
    return Evidence(total, None, sense, images)


def test_a_kind_is_fitted_on_its_own_tokens_where_there_are_enough() -> None:
    enough = least_tokens(128)
    assert enough == 512
    for text, visual in ((600, 511), (511, 600), (600, 600)):
        found = evidence(text, visual)
        assert found.visual is not None
        total, images = found.moments, found.visual
        for kind, own, count in ((TEXT, rest(total, images), text), (VISUAL, images, visual)):
            mine = of_kind(total, images, kind)
            wanted = own if count >= enough else balance(total, images)
            assert torch.equal(mine.k_gram, wanted.k_gram) and mine.count == wanted.count
            assert torch.equal(mine.q_gram, total.q_gram), "who reads is one question for both"
    assert of_kind(total, None, VISUAL) is total


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize(("visual", "text"), [(16.0, 2.0), (8.0, 4.0), (4.0, 4.0), (32.0, 2.0)])
def test_each_kind_has_the_bytes_that_its_ratio_leaves(
    measured: bool, visual: float, text: float
) -> None:
    layers = [evidence(700, 700, measured, seed) for seed in range(3)]
    codes = fit_modal(layers, (32, 32), Recipe(text, visual_ratio=visual), 0)
    dense = 2 * 2 * 128
    for kind, ratio in ((VISUAL, visual), (TEXT, text)):
        spent = 0.0
        for k, v in codes:
            assert isinstance(k.layout, ModalLayout) and isinstance(v.layout, ModalLayout)
            spent += sum(x.layout.token_bytes(torch.float16, kind) for x in (k, v))
        assert ratio <= len(layers) * dense / spent < 1.35 * ratio
    assert len({(k.layout, v.layout) for k, v in codes}) <= 4


def test_each_code_is_the_one_that_its_kind_has_alone() -> None:
    """Fitted on the tokens of its kind, with its ratio, less the byte that says the kind."""
    found = evidence(700, 800)
    assert found.visual is not None
    ((k, v),) = fit_modal([found], (32, 32), Recipe(3, visual_ratio=12), 0)
    for side, code in enumerate((k, v)):
        assert isinstance(code.layout, ModalLayout)
        count = code.layout.visual.param_count
        for kind, params in ((VISUAL, code.params[:count]), (TEXT, code.params[count:])):
            own = of_kind(found.moments, found.visual, kind)
            layout = code.layout.visual if kind == VISUAL else code.layout.text
            pairs = [(k.layout.visual, v.layout.visual), (k.layout.text, v.layout.text)]
            (alone,) = fit_transform([Evidence(own)], (32, 32), Recipe(4), 0, [pairs[kind == TEXT]])
            assert alone[side].layout == layout
            for mine, theirs in zip(params, alone[side].params, strict=True):
                assert torch.equal(mine, theirs)


def relative(code: Code, kind: int, x: Tensor) -> float:
    """Measured squared error of the code of one kind, over the energy about its mean."""
    assert isinstance(code.layout, ModalLayout)
    levels = torch.full((1, x.shape[2]), kind, dtype=torch.uint8)
    payload = code.layout.encode(x, code.params, None, levels)
    back = code.layout.decode(payload, code.params, x.dtype)
    first = 0 if kind == VISUAL else code.layout.visual.param_count
    about = x - code.params[first].view(1, x.shape[1], 1, -1)
    return float((back - x).square().sum() / about.square().sum())


def test_errors_are_those_of_each_kind_in_its_own_code() -> None:
    found = evidence(900, 700)
    ((_, v),) = fit_modal([found], (32, 32), Recipe(3, visual_ratio=12), 0)
    assert v.kinds is not None
    text, visual = v.kinds
    assert relative(v, TEXT, tokens(900, 2)) == pytest.approx(text, rel=0.2)
    assert relative(v, VISUAL, tokens(700, 1)) == pytest.approx(visual, rel=0.2)
    assert text < visual / 4
    assert v.error == pytest.approx((900 * text + 700 * visual) / 1600)


@pytest.mark.parametrize("visual", [None, 0])
def test_codes_fitted_on_text_alone_have_both(visual: int | None) -> None:
    """An image may come later: until codes have seen one, its tokens have the basis of text."""
    found = evidence(700, 0)
    if visual is None:
        found = replace(found, visual=None)
    ((k, v),) = fit_modal([found], (32, 32), Recipe(2, visual_ratio=12), 0)
    for code in (k, v):
        assert isinstance(code.layout, ModalLayout)
        assert code.layout.visual.rank and code.layout.text.rank > code.layout.visual.rank
        assert all(p.isfinite().all() for p in code.params)
        assert 0 < code.error < 0.1
    assert (v.kinds is None) == (visual is None)


@pytest.mark.parametrize("changes", [{"v_basis": "hadamard"}, {"k_code": "pre-rope"}])
def test_layouts_are_kept_by_a_later_fit(changes: dict[str, str]) -> None:
    recipe = Recipe(3, visual_ratio=12, **changes)
    first = fit_modal([evidence(700, 0)], (32, 32), recipe, 0)
    kept = [(k.layout, v.layout) for k, v in first]
    later = fit_modal([evidence(700, 700)], (32, 32), recipe, 0, kept)  # type: ignore[arg-type]
    assert [(k.layout, v.layout) for k, v in later] == kept
    assert not torch.equal(first[0][0].params[1], later[0][0].params[1])


def test_a_token_is_judged_by_what_its_own_code_expects() -> None:
    ((_, v),) = fit_modal([evidence(900, 700)], (32, 32), Recipe(3, visual_ratio=12), 0)
    for kind, x in ((TEXT, tokens(900, 2)), (VISUAL, tokens(700, 1))):
        levels = torch.full((1, x.shape[2]), kind, dtype=torch.uint8)
        _, judged = v.layout.encode_and_judge(x, v.params, None, levels)
        assert judged is not None
        assert float(judged.error.mean()) == pytest.approx(1, rel=0.2)
        assert torch.equal(judged.error, judged.strain)


def test_joined_codes_know_the_error_of_what_was_seen() -> None:
    a, b = (hand_code(x) for x in (VISUALS["keys"], TEXTS["keys"]))
    a, b = replace(a, error=0.4, kinds=(0.9, 0.3)), replace(b, error=0.02, kinds=(0.01, 0.8))
    assert isinstance(a.layout, TransformLayout)
    code = joined(a, b, (3.0, 1.0))
    assert code.kinds == (0.01, 0.3) and code.error == pytest.approx((3 * 0.01 + 0.3) / 4)
    nan = float("nan")
    assert joined(replace(a, kinds=(0.9, nan)), b, (3.0, 0.0)).error == pytest.approx(0.01)
    assert joined(replace(a, kinds=None), b, (1.0, 0.0)).error == 0.02
