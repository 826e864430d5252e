from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apack_compile.codec import EvictingLayout, TransformLayout, parse_layout
from apack_compile.codec.evicting import evicting
from apack_compile.codec.fit import Evidence, fit_transform
from apack_compile.codec.layout import PARTS
from apack_compile.codec.moments import Moments
from apack_compile.codec.recipe import Recipe
from apack_compile.codec.sensitivity import Sensitivity
from apack_compile.codec.tiered import TIERS, layout_of

from ..helpers import few, hand_code

SHAPE = (2, 16, 1)
INSIDE = {
    "plain": layout_of(SHAPE, (0, 16, 16), False),
    "gain": layout_of(SHAPE, (16, 0, 0), True),
    "tiers": layout_of(SHAPE, (0, 16, 16), True, TIERS),
    "before rotation": replace(layout_of(SHAPE, (0, 16, 0), False), rotary=16),
}
every_code = pytest.mark.parametrize("kind", INSIDE)


@every_code
def test_the_layout_says_what_it_stores(kind: str) -> None:
    inside = INSIDE[kind]
    layout = evicting(inside, 12)
    assert isinstance(layout, EvictingLayout) and layout.inner == inside
    assert parse_layout(layout.spec) == layout
    assert evicting(inside, 0) is inside
    fields, own = layout.payload_fields(torch.float16), inside.payload_fields(torch.float16)
    assert fields[0] == (1, torch.uint8) and layout.tokenwise == 1
    assert len(fields) - 1 == len(layout.shares) == len(layout.later_shares)
    levels = (1, torch.uint8) if inside.tier_shares else None
    assert list(fields[1:]) == [f for i, f in enumerate(own) if levels is None or i != 2]
    assert max(layout.shares) == PARTS - 12 and max(layout.later_shares) == PARTS
    saved = (PARTS - 12) / PARTS * (inside.token_bytes(torch.float16) - (levels is not None))
    rounded = sum(PARTS * f[0] for f in fields) / PARTS**2  # each share is rounded down
    assert saved + 1 - rounded <= layout.token_bytes(torch.float16) <= saved + 1


@every_code
@given(tokens=st.integers(1, 9), batch=st.integers(1, 3))
@few
def test_tokens_that_stay_are_what_they_are_without(kind: str, tokens: int, batch: int) -> None:
    inside, layout = INSIDE[kind], evicting(INSIDE[kind], 12)
    params = [p.double() for p in hand_code(inside).params]
    x = torch.randn(batch, 2, tokens, 16, dtype=torch.float64)
    places = torch.arange(tokens)[None].expand(batch, -1)
    whole = len(layout.shares) - len(inside.tier_shares)
    levels = torch.randint(0, len(inside.tier_shares) + 1, (batch, tokens), dtype=torch.uint8)
    stay = torch.rand(batch, tokens) < 0.6
    outer = torch.where(stay, levels + whole, 0).to(torch.uint8)
    mine = layout.encode(x, params, places, outer)
    theirs = inside.encode(x, params, places, levels if inside.tier_shares else None)
    assert torch.equal(layout.absent(mine), ~stay)
    got, want = (
        a.decode(b, params, x.dtype, places) for a, b in ((layout, mine), (inside, theirs))
    )
    kept = stay[:, None, :, None]
    mean = inside.decode(theirs, [params[0], *(0 * p for p in params[1:3]), *params[3:]],
                         x.dtype, places)  # fmt: skip
    torch.testing.assert_close(got, torch.where(kept, want, mean), rtol=1e-12, atol=1e-12)
    q = torch.randn(batch, 4, 2, 16, dtype=torch.float64)
    scores = [a.scores(q, b, params, places) for a, b in ((layout, mine), (inside, theirs))]
    seen = stay[:, None, None].expand_as(scores[0])
    torch.testing.assert_close(scores[0][seen], scores[1][seen], rtol=1e-12, atol=1e-12)
    p = torch.rand(batch, 4, 2, tokens, dtype=torch.float64) * seen
    mixed = [a.mix(p, b, params) for a, b in ((layout, mine), (inside, theirs))]
    torch.testing.assert_close(*mixed, rtol=1e-12, atol=1e-12)


@every_code
def test_tokens_of_no_level_all_stay(kind: str) -> None:
    inside, layout = INSIDE[kind], evicting(INSIDE[kind], 12)
    params = list(hand_code(inside).params)
    x, places = torch.randn(1, 2, 5, 16), torch.arange(5)[None]
    payload = layout.encode(x, params, places)
    assert not layout.absent(payload).any()
    assert torch.equal(
        layout.decode(payload, params, x.dtype, places),
        inside.decode(inside.encode(x, params, places), params, x.dtype, places),
    )


@pytest.mark.parametrize("tiers", [False, True])
@pytest.mark.parametrize("measured", [False, True])
def test_the_others_take_the_bytes_of_those_dropped(measured: bool, tiers: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 400, 32, generator=generator)
    sense: Any = None
    if measured:
        blocks = torch.eye(32, dtype=torch.float64).expand(4, 32, 32)
        sense = Sensitivity(blocks, blocks)
    evidence = Evidence(Moments.of(x, x, x, None), None, sense)
    dense = 2 * 2 * 4 * 32
    for evict in (0.0, 0.25, 0.5, 0.75):
        ((k, v),) = fit_transform([evidence], (32, 32), Recipe(8, tiers=tiers, evict=evict), 0)
        assert isinstance(k.layout, TransformLayout)
        assert k.layout.evicts == v.layout.evicts == evict * PARTS
        taken = sum(code.layout.token_bytes(torch.float16) for code in (k, v))
        assert 8 <= dense / taken < 9.5
        assert v.layout.tier_shares == (TIERS if tiers else ())


@pytest.mark.parametrize(("evict", "parts"), [(0, 0), (0.001, 1), (0.3, 10), (0.5, 16), (0.9, 29)])
def test_shares_are_counted_in_parts(evict: float, parts: int) -> None:
    assert Recipe(8, evict=evict).evicted == parts
