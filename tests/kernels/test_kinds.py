"""Tokens of a prompt by kind, against lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apack_compile.cache import Policy
from apack_compile.codec import ModalLayout
from apack_compile.codec.modal import TEXT, VISUAL
from apack_compile.kernels.kinds import all_text, sort_tokens
from apack_compile.kernels.planes import later_levels, members, quotas
from apack_compile.kernels.reference import unpack_reference

from ..helpers import few, modal_ref

CHUNK = 16


def mask(batch: int, tokens: int, share: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, tokens, generator=generator) < share


@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 90), window=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.2, 0.7, 1.0]), seed=st.integers(0, 9),
)  # fmt: skip
@few
def test_rows_are_the_coded_tokens_of_a_kind_in_their_order(
    batch: int, tokens: int, window: int, share: float, seed: int
) -> None:
    visual = mask(batch, tokens, share, seed)
    coded = max(tokens - window, 0)
    found = sort_tokens(visual, coded, CHUNK)
    assert torch.equal(found.kinds, visual.to(torch.uint8))
    assert found.kinds.stride() == (tokens, 1)
    assert found.has_visual == bool(visual.any())
    for kind, rows in enumerate(found.rows):
        lists = [[t for t in range(coded) if int(visual[b, t]) == kind] for b in range(batch)]
        assert found.counts[kind] == max(map(len, lists))
        assert rows.shape == (batch, CHUNK * max(-(-found.counts[kind] // CHUNK), 1))
        assert rows.stride() == (rows.shape[1], 1), "graphs are compiled for strides"
        assert int(rows.min()) >= 0 and int(rows.max()) < tokens
        for row, right in zip(rows.tolist(), lists, strict=True):
            assert row[: len(right)] == right


@pytest.mark.parametrize("coded", [0, 1, 40])
def test_tokens_that_nothing_is_known_of_are_text(coded: int) -> None:
    x = torch.zeros(2, 1, 50, 8)
    want = sort_tokens(torch.zeros(2, 50, dtype=torch.bool), coded, CHUNK)
    kinds, text, visual = all_text(x, coded, CHUNK)
    assert torch.equal(kinds, want.kinds)
    assert torch.equal(text[:, :coded], want.rows[TEXT][:, :coded])
    assert text.shape == want.rows[TEXT].shape and visual.shape == want.rows[VISUAL].shape
    assert int(text.max()) < 50


def test_a_plane_has_the_tokens_of_its_kind_and_later_ones_are_text() -> None:
    layout = modal_ref().layout
    assert isinstance(layout, ModalLayout)
    assert layout.plane_kinds == (VISUAL, VISUAL, TEXT, TEXT)
    levels = torch.tensor([[0, 1, 1, 0]], dtype=torch.uint8)
    assert [members(layout, levels, p)[0].tolist() for p in (1, 2, 3, 4)] == [
        [False, True, True, False], [False, True, True, False],
        [True, False, False, True], [True, False, False, True],
    ]  # fmt: skip
    assert quotas(layout, 50, kinds=(30, 25)) == [25, 25, 30, 30]
    assert quotas(layout, 50) == [0, 0, 50, 50]
    assert quotas(layout, 50, later=True) == [0, 0, 50, 50]
    assert not later_levels(torch.rand(2, 5), layout).any()


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_prompt_reads_as_the_code_of_each_kind_says(gain: bool, share: float) -> None:
    """Against the float64 oracle with a row for every token; rows differ in their numbers."""
    code, policy = modal_ref(gain).code, Policy(2, 6, 8, 16, CHUNK)
    x = torch.randn(3, 2, 100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    visual = mask(3, 100, share)
    visual[1] &= torch.arange(100) < 20
    seen = torch.arange(100) >= torch.tensor([[0], [7], [0]])
    settings = (policy.sinks, policy.extra, policy.window, policy.ring, policy.chunk)
    params, spec = list(code.params), code.layout.spec
    kinds = sort_tokens(visual, 92, CHUNK)
    *side, tally = torch.ops.apack.encode(
        x, seen, params, spec, *settings, None, kinds.tensors(x.device)
    )
    lengths = torch.tensor([92, 8])
    got = torch.ops.apack.unpack([*side, *params], lengths, 100, spec)
    whole = code.layout.encode(x, params, None, visual.to(torch.uint8))
    count = len(whole)
    pooled = side[count:]  # pool, positions, ring
    want = unpack_reference([*whole, *pooled, *params], lengths, 100, spec)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert [p.shape[1] for p in side[:count]] == [
        112, *[CHUNK * max(-(-kinds.counts[k] // CHUNK), 1) for k in code.layout.plane_kinds]
    ]  # fmt: skip
    in_pool = (side[count + 1][:, :, None] == torch.arange(92)).any(1)
    read = seen[:, :92] & ~in_pool
    counted = [int((read & (visual[:, :92] == kind)).sum()) for kind in (TEXT, VISUAL)]
    assert tally.shape == (6,) and tally[2::3].tolist() == counted
