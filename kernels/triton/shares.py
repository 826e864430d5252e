"""Which tiles, and which pieces of ring and pool, a program over codes takes.

A piece is ring and pool of X query rows of one head. Where the multiprocessors are full of programs
over codes, these do the pieces behind their codes, and have so many tiles fewer: with programs of
their own, pieces would be in the way of codes, or the last to end.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def own_pieces(pieces, split, splits, block, BLOCKS: tl.constexpr):
    """Numbers of the pieces of a program, from one to below another, every ``BLOCKS``-th.

    pieces: of the group. Those behind the splits have none.
    """
    of_block = (pieces + BLOCKS - 1 - block) // BLOCKS
    of_block = tl.where(split < splits, of_block, 0)
    first = split * of_block // splits
    last = (split + 1) * of_block // splits
    return block + first * BLOCKS, block + last * BLOCKS


@triton.jit
def own_tiles(
    tiles, pieces, split, splits, block, BLOCKS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Tiles of a program, from one to below another: one ends where the next begins.

    tiles: of all splits. PIECE: tiles that a piece takes as long as.
    """
    of_block = (pieces + BLOCKS - 1 - block) // BLOCKS
    # No more pieces than a program has time for, or it would end before it begins.
    most = (of_block + splits - 1) // splits * splits
    cost = tl.minimum(tiles // tl.maximum(most - of_block, 1), PIECE)
    units = tiles + cost * of_block
    first = split * units // splits - cost * (split * of_block // splits)
    last = (split + 1) * units // splits - cost * ((split + 1) * of_block // splits)
    return first, last
