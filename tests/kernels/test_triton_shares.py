"""Which tiles and which pieces of ring and pool each program takes: all of them, once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from apack_compile.kernels.triton.calls import INTERPRETED
from apack_compile.kernels.triton.shares import own_pieces, own_tiles

DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)


@triton.jit
def told(out, tiles, pieces, splits, tails, BLOCKS: tl.constexpr, PIECE: tl.constexpr):
    """``out [splits + tails, BLOCKS, 4]``: tiles and pieces of each program."""
    work = tl.program_id(0)
    block, split = work % BLOCKS, work // BLOCKS
    first, last = own_tiles(tiles, pieces, split, splits, block, BLOCKS, PIECE)
    piece, end = own_pieces(pieces, split, splits, block, BLOCKS)
    tl.store(out + work * 4, first)
    tl.store(out + work * 4 + 1, last)
    tl.store(out + work * 4 + 2, piece)
    tl.store(out + work * 4 + 3, end)


def cut(tiles: int, pieces: int, splits: int, tails: int, blocks: int, piece: int) -> torch.Tensor:
    """``[splits + tails, blocks, 4]``."""
    out = torch.full((splits + tails, blocks, 4), -1, dtype=torch.int32, device=DEVICE)
    told[((splits + tails) * blocks,)](out, tiles, pieces, splits, tails, blocks, piece)
    return out.cpu()


@settings(deadline=None)
@given(
    tiles=st.integers(0, 600), pieces=st.integers(0, 40), splits=st.integers(1, 40),
    tails=st.integers(0, 2), blocks=st.integers(1, 3), piece=st.integers(1, 20),
)  # fmt: skip
def test_every_tile_and_every_piece_has_one_program(
    tiles: int, pieces: int, splits: int, tails: int, blocks: int, piece: int
) -> None:
    shares = cut(tiles, pieces, splits, tails, blocks, piece)
    found = []
    for block in range(blocks):
        first, last = shares[:splits, block, 0], shares[:splits, block, 1]
        assert first[0] == 0 and last[-1] == tiles
        assert torch.equal(first[1:], last[:-1]) and bool((first <= last).all())
    for _, _, begin, end in shares.flatten(0, 1).tolist():
        found += range(begin, end, blocks)
    assert sorted(found) == list(range(pieces))
    assert bool((shares[splits:, :, 2] == shares[splits:, :, 3]).all())


@settings(deadline=None)
@given(pieces=st.integers(0, 12), splits=st.integers(1, 40), blocks=st.integers(1, 3))
def test_programs_with_pieces_have_fewer_tiles(pieces: int, splits: int, blocks: int) -> None:
    """All take as long, to a tile, where there are tiles enough."""
    shares = cut(16 * splits * (1 + pieces), pieces, splits, 0, blocks, 5)
    own = (shares[..., 3] - shares[..., 2] + blocks - 1) // blocks
    long = shares[..., 1] - shares[..., 0] + 5 * own
    for block in range(blocks):
        assert int(long[:, block].max() - long[:, block].min()) <= 1


def test_few_tiles_are_no_reason_to_go_back() -> None:
    """A program with pieces has no tiles then; it does not begin before the one before it ends."""
    shares = cut(3, 4, 8, 0, 1, 5)[:, 0]
    assert (shares[:, 1] - shares[:, 0]).tolist() == [0, 0, 1, 0, 0, 1, 0, 1]
    assert (shares[:, 3] - shares[:, 2]).tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
