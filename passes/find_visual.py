"""Find which tokens are visual, by data flow: text is looked up in a table, images are computed.

    text     = embedding(ids, table)                                   [B, S, C]
    features = project(vision(pixels))                                 [N, C]
    merged   = text.masked_scatter(mask, features)                     [B, S, C]
             | where(mask, features, text)
             | index_put(text, mask, features), text[mask] = features
             | cat([features, text], 1)
    keys     = project(norm(merged)), ...

The residual stream carries tokens from layer to layer; attention mixes them, but a token stays
what it is. So every operand ``[B, S, *]`` of an operation hands its tokens on to a result
``[B, S, *]``. Graph breaks often cut text, features and the merge apart: embeddings that are an
input (``Given``) are what the graph that made them knows of them
(:mod:`apack_compile.runtime.visual`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .ancestry import as_networkx, projected_from
from .base import argument, calls, same_size, shape_of, value_of

_EMBEDDING = (torch.nn.functional.embedding, torch.embedding)
_SCATTER = ("masked_scatter", "masked_scatter_", torch.masked_scatter)
_WHERE = (torch.where, "where")
_PUT = ("index_put", "index_put_", torch.index_put, torch.index_put_, operator.setitem)
_IN_PLACE = ("masked_scatter_", "index_put_", torch.index_put_, operator.setitem)
_CAT = (torch.cat, torch.concat)
_BLANK = (
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.zeros, torch.ones,
    torch.empty, torch.full, "new_zeros", "new_ones", "new_empty", "new_full",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Text:
    """Tokens looked up in a table, or made of parameters alone."""


@dataclass(frozen=True, eq=False)
class Image:
    """Tokens computed from floating-point inputs (pixels, or features made of them)."""


@dataclass(frozen=True)
class Given:
    """Tokens that another graph made: argument ``index`` of this one."""

    index: int


@dataclass(frozen=True, eq=False)
class Chosen:
    """Tokens of ``chosen`` where ``condition`` (broadcast to ``[B, S, C]``), else of ``other``."""

    condition: fx.Node
    chosen: Kinds
    other: Kinds


@dataclass(frozen=True, eq=False)
class Put:
    """Tokens of ``base``, those at ``index`` of ``node`` (``[B, S, C]``) overwritten by images."""

    node: fx.Node
    base: Kinds
    index: Any


@dataclass(frozen=True, eq=False)
class Joined:
    """Tokens of the nodes of ``parts`` one behind the other."""

    parts: tuple[tuple[fx.Node, Kinds], ...]


Origin = Text | Image | Given | Chosen | Put | Joined

Kinds = frozenset[Origin]
"""Where the tokens of a tensor ``[B, S, C]`` come from; a token is visual if any origin says so."""

NONE: Kinds = frozenset()
TEXT: Kinds = frozenset({Text()})
IMAGE: Kinds = frozenset({Image()})

NO_IMAGE = "no image in this graph"


def find_visual(graph: fx.Graph, keys: fx.Node) -> Kinds | str:
    """Where the tokens behind ``keys`` come from, or why no class of tokens is known.

    Args:
        graph: a Dynamo graph of a prefill.
        keys: new keys of its first attention site, ``[B, H, S, D]``.
    """
    kinds = TokenFlow(graph).of(hidden_states(graph, keys))
    if not kinds:
        return "the tokens' embeddings are not found in this graph"
    return NO_IMAGE if kinds == TEXT else kinds


def hidden_states(graph: fx.Graph, keys: fx.Node) -> frozenset[fx.Node]:
    """The tensors ``[B, S, C]`` that ``keys`` are projected from."""
    return projected_from(as_networkx(graph), keys, 1)


class TokenFlow:
    """The tokens in every tensor ``[B, S, C]`` of a graph.

    One walk in program order: writes in place count from there on.

    Attributes:
        kinds: of the tensors that carry tokens.
        computed: nodes that depend on a floating-point input other than parameters.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.kinds: dict[fx.Node, Kinds] = {}
        self.computed: set[fx.Node] = set()
        inputs = (n for n in graph.nodes if n.op == "placeholder")
        self._position = {node: index for index, node in enumerate(inputs)}
        for node in graph.nodes:
            self._visit(node)

    def of(self, nodes: Iterable[fx.Node]) -> Kinds:
        """The union over ``nodes``."""
        return NONE.union(*(self.kinds[node] for node in nodes if node in self.kinds))

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._input(node)
        elif node.op.startswith("call") and not calls(node, *_BLANK):
            sources = node.all_input_nodes
            if calls(node, *_EMBEDDING):
                sources = [argument(node, 0, "input")]  # the table says nothing of the tokens
            if any(source in self.computed for source in sources):
                self.computed.add(node)
            kinds = self._of_call(node)
            if kinds:
                changed = node.args[0] if calls(node, *_IN_PLACE) else node
                assert isinstance(changed, fx.Node)
                self.kinds[changed] = self.kinds[node] = kinds

    def _input(self, node: fx.Node) -> None:
        value = value_of(node)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        if isinstance(value, torch.nn.Parameter) or value.dim() < 2:
            return  # weights; tables of frequencies
        self.computed.add(node)
        if value.dim() == 3:
            self.kinds[node] = frozenset({Given(self._position[node])})

    def _of_call(self, node: fx.Node) -> Kinds:
        if calls(node, operator.setitem):
            return self._put(node) if _carries_tokens(node.args[0]) else NONE
        if not _carries_tokens(node):
            return NONE
        if calls(node, *_EMBEDDING):
            return TEXT
        if calls(node, *_SCATTER):
            return self._scatter(node)
        if calls(node, *_PUT):
            return self._put(node)
        if calls(node, *_WHERE):
            return self._where(node)
        if calls(node, *_CAT) and argument(node, 1, "dim", 0) in (1, -2):
            return self._cat(node)
        return self._handed_on(node)

    def _handed_on(self, node: fx.Node) -> Kinds:
        """The union over operands with the tokens of the result."""
        sources = node.all_input_nodes
        if calls(node, operator.getitem) and not isinstance(value_of(node.args[0]), Tensor):
            sources = node.args[0].all_input_nodes
        return self.of(s for s in sources if s in self.kinds and _same_tokens(s, node))

    def _scatter(self, node: fx.Node) -> Kinds:
        base: Any = argument(node, 0, "input")
        if argument(node, 2, "source") not in self.computed:
            return self.kinds.get(base, NONE)
        return frozenset({Chosen(argument(node, 1, "mask"), IMAGE, self.kinds.get(base, TEXT))})

    def _put(self, node: fx.Node) -> Kinds:
        base: Any = argument(node, 0, "input")
        if argument(node, 2, "values") not in self.computed:
            return self.kinds.get(base, NONE)
        return frozenset({Put(base, self.kinds.get(base, TEXT), argument(node, 1, "indices"))})

    def _where(self, node: fx.Node) -> Kinds:
        if node.op == "call_method":
            chosen, condition = node.args[0], argument(node, 1, "condition")
        else:
            condition, chosen = argument(node, 0, "condition"), argument(node, 1, "input")
        other = argument(node, 2, "other")
        if not (_carries_tokens(chosen) and _carries_tokens(other)):
            return self._handed_on(node)  # filled with a constant
        sides = self._side(chosen), self._side(other)
        if sides[0] == sides[1]:
            return self._handed_on(node)
        return frozenset({Chosen(condition, *sides)})

    def _cat(self, node: fx.Node) -> Kinds:
        parts = argument(node, 0, "tensors")
        sides = tuple((part, self._side(part)) for part in parts)
        return TEXT if all(side == TEXT for _, side in sides) else frozenset({Joined(sides)})

    def _side(self, node: Any) -> Kinds:
        """The kinds of an operand of a merge; computed tokens without a text among them: images."""
        kinds = self.kinds.get(node, NONE)
        if node in self.computed and kinds <= TEXT:
            return IMAGE
        return kinds or TEXT


def _carries_tokens(node: Any) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()


def _same_tokens(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors are both ``[B, S, *]``."""
    mine, theirs = shape_of(a), shape_of(b)
    assert mine is not None and theirs is not None
    return all(same_size(x, y) for x, y in zip(mine[:2], theirs[:2], strict=True))
