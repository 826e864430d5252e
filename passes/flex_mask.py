"""The mask of a flex_attention call: a record, and its nodes in a rewritten graph.

    seen = mask_mod(b, h, q, k) where a block is partial, true where it is full, else false
    mask = seen                                   bool, if no score_mod adds anything
    mask = where(seen, added(b, h, q, k), -inf)   else

Blocks are laid over mask_mod exactly: a BlockMask says which there are, and they need not be those
that its mask_mod would give. A block that is listed twice counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from .base import shape_of, value_of
from .flex_records import ROUNDED, Ref, Step

aten = torch.ops.aten


@dataclass(frozen=True)
class Blocks:
    """Which blocks of queries and keys there are.

    Attributes:
        partial: blocks in each row of blocks ``[B|1, H|1, R]``, and their columns
            ``[B|1, H|1, R, C]``, of which as many count.
        full: the same, of blocks without a mask_mod; or None.
        sizes: queries and keys of a block.
    """

    partial: tuple[fx.Node, fx.Node]
    full: tuple[fx.Node, fx.Node] | None
    sizes: tuple[int, int]


@dataclass(frozen=True)
class FlexMask:
    """What flex_attention does to scores behind their softcap.

    Equal masks give equal tensors.

    Attributes:
        steps: what the two functions compute.
        added: by score_mod, or None.
        seen: of score_mod, or None: everything.
        within: of mask_mod, where a block is not full; or None: everything.
        blocks: or None: there is one block, of everything.
        sizes: B, heads, queries and keys, as Dynamo writes them.
    """

    steps: tuple[Step, ...]
    added: Ref | None
    seen: Ref | None
    within: Ref | None
    blocks: Blocks | None
    sizes: tuple[str, ...]

    @property
    def tensors(self) -> tuple[fx.Node, ...]:
        """What it is made of in the Dynamo graph: captured tensors, and those of the blocks."""
        read: list[Any] = [step.args for step in self.steps]
        if self.blocks is not None:
            read += [self.blocks.partial, self.blocks.full]
        return tuple(leaf for leaf in tree_leaves(read) if isinstance(leaf, fx.Node))

    @property
    def is_trivial(self) -> bool:
        """Whether it changes nothing."""
        return self.added is None and self.seen is None and self.within is None and not self.blocks


def write_mask(
    graph: fx.Graph, mask: FlexMask, q: fx.Node, keys: fx.Node, mapped: Callable[[fx.Node], fx.Node]
) -> fx.Node:
    """Nodes for ``mask`` at the insertion point of ``graph``.

    Args:
        graph: the new graph.
        mask: the record.
        q: queries ``[B, H, Q, D]``, a node of the Dynamo graph.
        keys: the numbers of the keys, int64 ``[S]``.
        mapped: the node of the new graph for one of the Dynamo graph.

    Returns:
        bool, or numbers to be added: ``[B|1, H|1, Q|1, S|1]``.
    """
    return _Writer(graph, mask, q, keys, mapped).write()


class _Writer:
    def __init__(
        self, graph: fx.Graph, mask: FlexMask, q: fx.Node, keys: fx.Node,
        mapped: Callable[[fx.Node], fx.Node],
    ) -> None:  # fmt: skip
        self.graph = graph
        self.mask = mask
        self.q = q
        self.keys = keys
        self.mapped = mapped
        self.known: dict[int, fx.Node] = {}

    def write(self) -> fx.Node:
        mask = self.mask
        parts = [self.value(ref) for ref in (mask.seen,) if ref is not None]
        parts += self.of_blocks()
        seen = parts[0] if parts else None
        if len(parts) == 2:
            seen = self.call(aten.logical_and.default, *parts)
        if mask.added is None:
            assert seen is not None
            return seen
        added = self.value(mask.added)
        if seen is None:
            return added
        return self.call(aten.where.ScalarOther, seen, added, float("-inf"))

    def of_blocks(self) -> list[fx.Node]:
        """What blocks and mask_mod show, if they hide anything."""
        within, blocks = self.mask.within, self.mask.blocks
        inside = [] if within is None else [self.value(within)]
        if blocks is None:
            return inside
        seen = self.dense(*blocks.partial)
        if inside:
            seen = self.call(aten.logical_and.default, seen, *inside)
        if blocks.full is not None:
            seen = self.call(aten.logical_or.default, seen, self.dense(*blocks.full))
        return [seen]

    def dense(self, counts: fx.Node, columns: fx.Node) -> fx.Node:
        """Whether a score is in one of these blocks: ``[B|1, H|1, Q, S]``."""
        assert self.mask.blocks is not None
        counts, columns = self.mapped(counts), self.mapped(columns)
        count = self.call(aten.sym_size.int, columns, 3)
        numbers = self.call(aten.arange.default, count, device=self.device)  # [C]
        listed = self.call(aten.lt.Tensor, numbers, self.call(aten.unsqueeze.default, counts, -1))
        # [B|1, H|1, R, C listed, C]
        same = self.call(aten.eq.Tensor, self.call(aten.unsqueeze.default, columns, -1), numbers)
        same = self.call(
            aten.logical_and.default, same, self.call(aten.unsqueeze.default, listed, -1)
        )
        present = self.call(aten.any.dim, same, 3)  # [B|1, H|1, R, C]
        rows, cols = self.mask.blocks.sizes
        for dim, numbers, size in ((2, self.size_range(2), rows), (3, self.keys, cols)):
            # Inductor's C++ for floor_divide of integers gives garbage where sizes vary (2.13).
            block = self.call(ROUNDED, numbers, size, rounding_mode="trunc")
            present = self.call(aten.index_select.default, present, dim, block)
        return present

    def value(self, ref: Ref) -> fx.Node:
        """The result of a step."""
        if ref.step not in self.known:
            self.known[ref.step] = self.index(ref.step) if ref.step < 0 else self.run(ref.step)
        return self.known[ref.step]

    def run(self, number: int) -> fx.Node:
        step = self.mask.steps[number]
        args = [self.operand(a) for a in step.args]
        if step.target is ROUNDED:
            return self.call(ROUNDED, *args[:2], rounding_mode=args[2])
        return self.call(step.target, *args)

    def operand(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return [self.operand(v) for v in value]
        if isinstance(value, Ref):
            return self.value(value)
        return self.mapped(value) if isinstance(value, fx.Node) else value

    def index(self, dim: int) -> fx.Node:
        """The numbers of sequences, heads, queries or keys, along their own dimension."""
        numbers = self.keys if dim == -1 else self.size_range(dim)
        shape = [1, 1, 1, 1]
        shape[dim] = -1
        return self.call(aten.reshape.default, numbers, shape)

    def size_range(self, dim: int) -> fx.Node:
        """``[0, 1, ...]`` along a dimension of the queries."""
        sizes = shape_of(self.q)
        assert sizes is not None
        size = sizes[dim]
        if not isinstance(size, int):
            size = self.call(aten.sym_size.int, self.mapped(self.q), dim % 4)
        return self.call(aten.arange.default, size, device=self.device)

    @property
    def device(self) -> torch.device:
        device: torch.device = value_of(self.q).device
        return device

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)
