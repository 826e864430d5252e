"""Read a call of flex_attention.

    out, lse, most = flex_attention(q, k, v, score_mod, block_mask, scale, options, ...)
        ->  Flex(out, q, k, v, scale, softcap, mask)

``block_mask`` is what ``BlockMask.as_tuple`` gives: Q, S, blocks of keys (partial, then full),
blocks of queries, and at its end the sizes of a block and mask_mod. The function itself checked
that Q and S are those of queries and keys, unless blocks are larger than any tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.flex_attention import flex_attention

from .base import argument, attribute, calls, same_size, shape_of, value_of
from .constants import number
from .find_writes import is_written
from .flex_mask import Blocks, FlexMask
from .flex_mods import Reader
from .flex_records import Scores, Unread

LARGEST_BLOCK = 1 << 30
"""Sizes of the one block of a call without a BlockMask."""


@dataclass(frozen=True)
class Flex:
    """A call.

    Attributes:
        node: its first result, ``[B, Hq, Q, Dv]``.
        q, k, v: its operands.
        scale: factor of the scores.
        softcap: what scores are capped at; 0: they are not.
        mask: what is laid over them, or None.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    softcap: float
    mask: FlexMask | None


def find_flex(node: fx.Node) -> Flex | str | None:
    """The record of a call, or why there is none; None if it is no call."""
    if not calls(node, flex_attention):
        return None
    names = ("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options")
    q, k, v, score_mod, block_mask, scale, options = (
        argument(node, i, name) for i, name in enumerate(names)
    )
    if not all(isinstance(operand, fx.Node) for operand in (q, k, v)):
        return "flex_attention: an operand is not a tensor of the graph"
    results = [u for u in node.users if not (calls(u, operator.getitem) and not u.users)]
    if [u.args[1] for u in results if calls(u, operator.getitem)] != [0] or len(results) != 1:
        return "flex_attention: more than its output is used (lse): left dense"
    if options.get("SKIP_MASK_SCORE"):
        return "flex_attention: SKIP_MASK_SCORE is set: left dense"
    scale = number(scale)
    if scale is None:
        return "flex_attention: the scale is not a constant"
    sizes = _sizes(q, k)
    if isinstance(sizes, str):
        return f"flex_attention: {sizes}: left dense"
    blocks = _blocks(block_mask, q)
    if isinstance(blocks, str):
        return f"flex_attention: {blocks}: left dense"
    captured = argument(node, 7, "score_mod_other_buffers", ())
    masked = argument(node, 8, "mask_mod_other_buffers", ())
    given = value_of(q)
    dtype = torch.float64 if given.dtype == torch.float64 else torch.float32  # as flex computes
    reader = Reader(dtype, given.device)
    read: list[Any] = []
    for name, read_it, mod, more in (
        ("score_mod", reader.scores, score_mod, captured),
        ("mask_mod", reader.mask, block_mask[-1], masked),
    ):
        try:
            read.append(_read(node, read_it, mod, more))
        except Unread as error:
            return f"flex_attention: {name}: {error}: left dense"
    scores: Scores = read[0]
    mask = FlexMask(reader.steps, scores.added, scores.seen, read[1], blocks, sizes)
    factor = scores.factor * (scores.cap or 1.0)  # cap tanh(factor s); a site has cap tanh(s / cap)
    return Flex(
        results[0], q, k, v, scale * factor, abs(scores.cap), None if mask.is_trivial else mask
    )


def _read(node: fx.Node, read: Any, mod: Any, captured: Sequence[Any]) -> Any:
    gm = node.graph.owning_module
    if not isinstance(mod, fx.Node) or mod.op != "get_attr" or gm is None:
        raise Unread("it is no part of the graph")
    return read(attribute(gm, str(mod.target)), captured)


def _sizes(q: fx.Node, k: fx.Node) -> tuple[str, ...] | str:
    """B, heads, queries and keys, or why they are not those of one attention."""
    q_shape, k_shape = shape_of(q), shape_of(k)
    if q_shape is None or k_shape is None or len(q_shape) != 4 or len(k_shape) != 4:
        return "queries or keys are not [B, heads, tokens, head_dim]"
    if not same_size(q_shape[0], k_shape[0]):
        return "queries and keys are not of the same sequences"
    return tuple(map(str, (*q_shape[:3], k_shape[2])))


def _blocks(block_mask: Sequence[Any], q: fx.Node) -> Blocks | str | None:
    """The blocks that there are; None: one, of everything."""
    partial, full = block_mask[2:4], block_mask[4:6]
    sizes = tuple(map(value_of, block_mask[-3:-1]))
    if not all(isinstance(size, int) for size in sizes):
        return "the sizes of its blocks are not known when compiling"
    if all(size >= LARGEST_BLOCK for size in sizes) and _is_all(*partial) and full[0] is None:
        return None
    for tensors, batch_and_heads in ((partial, True), (full, full[0] is not None)):
        if batch_and_heads and not all(_goes_with(t, q) for t in tensors):
            return "its blocks are not those of the queries"
    return Blocks(tuple(partial), None if full[0] is None else tuple(full), sizes)


def _is_all(counts: Any, columns: Any) -> bool:
    """Whether the only block is listed: what flex_attention makes if it is given no BlockMask."""
    made = calls(counts, torch.ones) and calls(columns, torch.zeros)
    return made and not is_written(counts) and not is_written(columns)


def _goes_with(tensor: Any, q: fx.Node) -> bool:
    shape, wanted = shape_of(tensor), shape_of(q)
    if shape is None or wanted is None or len(shape) not in (3, 4):
        return False
    return all(
        (isinstance(a, int) and a == 1) or same_size(a, b)
        for a, b in zip(shape[:2], wanted[:2], strict=True)
    )
