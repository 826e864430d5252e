"""Which tokens of a prompt are visual: evaluates what ``passes.find_visual`` found.

Graph breaks cut a model into graphs; embeddings that one graph merges are the input of the next.
Every graph therefore leaves a word about the embeddings that it returns, and the next graph looks
it up by the tensor itself. Tensors that nobody has a word about (merged in eager code, or made by
the user) are of unknown kind.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from ..passes.base import output_of, shape_of, value_of
from ..passes.find_visual import TEXT, Chosen, Given, Image, Joined, Kinds, Put, Text, TokenFlow
from ..passes.find_writes import is_written
from .arguments import Sizes

Mask: TypeAlias = "Tensor | bool | None"
"""Which tokens are visual: bool, broadcastable to ``[B, S]``; None: not known."""


class Memory:
    """What graphs have said of the embeddings that they returned, while those live."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def note(self, embeddings: Tensor, visual: Mask) -> None:
        """Remember which tokens of ``embeddings [B, S, C]`` are visual."""
        with self._lock:
            self._known[embeddings] = visual

    def of(self, embeddings: Any) -> Mask:
        """Which tokens are visual."""
        with self._lock:
            return self._known.get(embeddings)


MEMORY = Memory()


class TokenKinds:
    """The kinds of tokens of one Dynamo graph, evaluated for the arguments of a call."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._sizes = Sizes(gm.graph)
        inputs = (n for n in gm.graph.nodes if n.op == "placeholder")
        self._position = {node: index for index, node in enumerate(inputs)}
        flow = TokenFlow(gm.graph)
        results: Any = output_of(gm.graph).args[0]
        self._returned = [
            (index, flow.kinds[node])
            for index, node in enumerate(results)
            if node in flow.kinds and not (flow.kinds[node] <= TEXT and node in flow.computed)
        ]

    def note_results(self, args: Sequence[Any], results: Sequence[Any]) -> None:
        """Leave a word about every result that carries tokens."""
        for index, kinds in self._returned:
            visual = self.visual(kinds, args)
            if visual is not None:
                MEMORY.note(results[index], visual)

    def may_be_visual(self, kinds: Kinds, args: Sequence[Any]) -> bool:
        """Whether any token could be visual, without computing which."""
        return any(
            isinstance(MEMORY.of(args[origin.index]), Tensor)
            if isinstance(origin, Given)
            else not isinstance(origin, Text)
            for origin in kinds
        )

    def visual(self, kinds: Kinds, args: Sequence[Any]) -> Mask:
        """Which tokens are visual in the call with ``args``."""
        return _Call(self._gm, self._sizes, self._position, args).any_of(kinds)


class _Unclear(Exception):
    """A condition depends on a tensor that the graph writes to."""


class _Call:
    """Evaluates kinds for one call."""

    def __init__(
        self, gm: fx.GraphModule, sizes: Sizes, position: dict[fx.Node, int], args: Sequence[Any]
    ) -> None:
        self.gm = gm
        self.sizes = sizes
        self.position = position
        self.args = args
        self.values: dict[fx.Node, Any] = {}

    def any_of(self, kinds: Kinds) -> Mask:
        """True where any origin says visual; text and an unknown origin leave it unknown."""
        try:
            masks = [self._of(origin) for origin in kinds]
        except _Unclear:
            return None
        visual = reduce(or_, (mask for mask in masks if mask is not None), False)
        return None if visual is False and None in masks else visual

    def _of(self, origin: Any) -> Mask:
        if isinstance(origin, (Text, Image)):
            return isinstance(origin, Image)
        if isinstance(origin, Given):
            return MEMORY.of(self.args[origin.index])
        if isinstance(origin, Chosen):
            sides = _settled([self.any_of(origin.chosen), self.any_of(origin.other)])
            return sides and torch.where(self._value(origin.condition).any(-1), *sides)
        if isinstance(origin, Put):
            return self._put(origin)
        assert isinstance(origin, Joined)
        parts = _settled([self.any_of(kinds) for _, kinds in origin.parts])
        return parts and torch.cat(
            [
                self._full(node, mask)[..., 0]
                for (node, _), mask in zip(origin.parts, parts, strict=True)
            ],
            1,
        )

    def _put(self, origin: Put) -> Tensor:
        base = self.any_of(origin.base)
        visual = self._full(origin.node, False if base is None else base).clone()
        index = fx.map_arg(origin.index, self._value)
        visual[tuple(index) if isinstance(index, list) else index] = True
        return visual.any(-1)

    def _full(self, node: fx.Node, mask: Tensor | bool) -> Tensor:
        """``mask`` broadcast to the shape of ``node``, ``[B, S, C]``."""
        shape = [self.sizes.value(size, self.args) for size in shape_of(node) or ()]
        mask = torch.as_tensor(mask, device=value_of(node).device)
        return mask[..., None].expand(shape)

    def _value(self, node: fx.Node) -> Any:
        """What a node is in this call, computed anew."""
        if node in self.position:
            value = self.args[self.position[node]]
        elif node in self.values:
            return self.values[node]
        elif node.op == "get_attr":
            value = _attribute(self.gm, str(node.target))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
            if node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                value = node.target(*args, **kwargs)
        if is_written(node):
            raise _Unclear
        self.values[node] = value
        return value


def _settled(masks: Sequence[Mask]) -> tuple[Tensor | bool, ...] | None:
    """Masks of operands that are merged; None if none is known.

    What is merged with nothing but text is an image; what is merged with an image is text.
    """
    if all(mask is None for mask in masks):
        return None
    rest = any(mask is False for mask in masks)
    return tuple(rest if mask is None else mask for mask in masks)


def _attribute(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    return value
