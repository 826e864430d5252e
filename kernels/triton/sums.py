"""Sums over the tokens of a tile: of weights, and of codes of values times weights."""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import converted, converted_at, rotation_of


@triton.jit
def rotations(table, PAD: tl.constexpr, BITS: tl.constexpr, STACK: tl.constexpr):
    """How far the words of the first product are rotated for its codes, one for each row.

    Made of 0 .. 63 in ``table``, read from memory: Triton lets the layout of a product's operand
    go back through what is loaded, but not through a range that it makes itself; it would move the
    operand through shared memory instead.
    """
    return rotation_of(tl.load(table + tl.arange(0, STACK * PAD // 2)) // (PAD // 2), BITS)


@triton.jit
def mix(
    p16, words, acc, rotations, BITS: tl.constexpr, PART: tl.constexpr, PAD: tl.constexpr,
    STACK: tl.constexpr, N: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Weighted sums over tokens, ``[STACK * PAD / 2, M]``: product ``PART`` of a run's values.

    Tensor cores want 64 rows: where a run has fewer words, STACK codes of each word are stacked.
    words: ``[STACK * PAD / 2, N]``, all of them STACK times (:func:`.codes.load_run`). They are
    read so often, from the L2 cache: a tile that goes into a product as it is loaded is copied to
    shared memory ahead of it; one that is stacked behind the load waits in registers.
    """
    if STACK == 1:
        return tl.dot(converted(words, BITS, PART, ASM), p16, acc)
    else:
        by = (rotations - PART * STACK * BITS)[:, None]
        by = tl.broadcast_to(by, (STACK * PAD // 2, N))
        return tl.dot(converted_at(words, by, BITS, ASM), p16, acc)


@triton.jit
def paired(x, N: tl.constexpr, M: tl.constexpr):
    """Numbers of tokens ``[N, M]`` summed in pairs, ``[N / 16, 8, M]``: those 8 tokens apart, which
    one thread holds where x comes from a product. So a sum takes half the registers."""
    return tl.sum(tl.reshape(x, (N // 16, 2, 8, M)), 1)


@triton.jit
def store_sums(
    out, acc, rows, some, PART: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, STACK: tl.constexpr, VW: tl.constexpr,
):  # fmt: skip
    """Sums of product ``PART`` of a run, to ``out [rows, VW]``, in the order of codes."""
    r = tl.arange(0, STACK * PAD // 2)
    code = PART * STACK + r // (PAD // 2)
    word = r % (PAD // 2)
    where = START + code * (WIDTH // 2) + word
    held = (word < WIDTH // 2)[:, None] & some[None, :]
    tl.store(out + rows[None, :] * VW + where[:, None], acc, mask=held)
