from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apack_compile import ops  # noqa: F401  (registers the operators)
from apack_compile.codec import TieredLayout
from apack_compile.codec.layout import PARTS
from apack_compile.codec.tiered import layout_of
from apack_compile.kernels.planes import counted, in_plane, quotas, spread, token_levels, write_rows

from ..helpers import few

SHARES = (26, 16, 6, 2)
LAYOUT = layout_of((1, 16, 1), (16, 0, 0), True, SHARES)


def test_levels_go_by_importance() -> None:
    importance = torch.arange(64.0)[torch.randperm(64)][None]
    levels = torch.ops.apack.token_levels(importance, SHARES)
    assert levels.dtype == torch.uint8
    for plane, share in enumerate(SHARES, 1):
        chosen = importance[levels >= plane]
        assert chosen.sort().values.tolist() == list(range(64 - 2 * share, 64))


def test_equal_tokens_are_served_in_their_order() -> None:
    levels = token_levels(torch.ones(1, 32), SHARES)
    assert levels[0].tolist() == [4] * 2 + [3] * 4 + [2] * 10 + [1] * 10 + [0] * 6


@given(pads=st.lists(st.integers(0, 40), min_size=1, max_size=3), tokens=st.integers(1, 90))
@few
def test_a_sequence_has_the_levels_that_it_would_have_alone(pads: list[int], tokens: int) -> None:
    importance = torch.rand(len(pads), max(pads) + tokens)
    for row, pad in enumerate(pads):
        importance[row, :pad] = -1
    levels = token_levels(importance, SHARES)
    for row, pad in enumerate(pads):
        assert not levels[row, :pad].any()
        assert torch.equal(
            levels[row : row + 1, pad:], token_levels(importance[row:, pad:][:1], SHARES)
        )
        for plane, share in enumerate(SHARES, 1):
            held = importance.shape[1] - pad
            assert int((levels[row] >= plane).sum()) == -(-share * held // PARTS)


@given(
    runs=st.lists(st.integers(1, 70), min_size=1, max_size=4), batch=st.integers(1, 3),
    crop=st.floats(0, 1),
)  # fmt: skip
@few
def test_rows_are_found_again_whatever_was_written_and_cropped(
    runs: list[int], batch: int, crop: float
) -> None:
    """Against a list of rows for each token."""
    total = sum(runs)
    levels = torch.zeros(batch, total + 8, 1, dtype=torch.uint8)
    planes = [torch.full((batch, total, 3), 255, dtype=torch.uint8) for _ in SHARES]
    want: list[list[list[list[int]]]] = [[[] for _ in range(batch)] for _ in SHARES]
    start = 0
    for number, run in enumerate(runs):
        if number == 2:
            start = int(start * crop)
            want = [[row[:start] for row in plane] for plane in want]
        mine = token_levels(torch.rand(batch, run), SHARES)
        levels[:, start : start + run, 0] = mine
        rows = torch.randint(0, 255, (batch, run, 3), dtype=torch.uint8)
        for plane, count in enumerate(quotas(LAYOUT, run), 1):
            has = mine >= plane
            first = counted(LAYOUT, levels, plane, start)
            write_rows(planes[plane - 1], in_plane(rows, has, count), first)
            for row in range(batch):
                kept = [
                    r if h else []
                    for r, h in zip(rows[row].tolist(), has[row].tolist(), strict=True)
                ]
                want[plane - 1][row] += kept
        start += run
    codes, gains = torch.zeros(2, batch, start, 1)
    _, _, _, *found = spread([codes, gains, levels[:, :start], *planes], LAYOUT)
    for plane, got in enumerate(found):
        for row in range(batch):
            for token, right in enumerate(want[plane][row]):
                assert not right or got[row, token].tolist() == right


def test_a_layout_without_planes_is_left_as_it_is() -> None:
    layout = TieredLayout(1, 16, 1, 16, 0, 0, 1)
    payload = [torch.zeros(1, 4, 16)]
    assert spread(payload, layout)[0] is payload[0]


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_that_do_not_count_have_no_rows(batch: int) -> None:
    assert not token_levels(torch.full((batch, 40), -1.0), SHARES).any()
