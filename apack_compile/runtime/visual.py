"""Which tokens of a prompt are visual: evaluates what ``passes.find_visual`` found.

Graph breaks cut a model into graphs; embeddings that one graph merges are the input of the next.
Every graph therefore leaves a word about the embeddings that it returns, and the next graph looks
it up by the tensor itself. Tensors that nobody has a word about (merged in eager code, or made by
the user) are of unknown kind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from ..locks import lock
from ..passes.base import attribute, output_of, shape_of, value_of
from ..passes.find_visual import (
    NO_IMAGE,
    TEXT,
    Chosen,
    Given,
    Image,
    Joined,
    Kinds,
    Put,
    Text,
    TokenFlow,
    find_visual,
    hidden_states,
)
from ..passes.find_writes import is_written
from ..passes.plan import PlannedSite
from .arguments import Sizes
from .given import fitted_mask, given_mask

log = logging.getLogger(__name__)

Mask: TypeAlias = "Tensor | bool | None"
"""Which tokens are visual: bool, broadcastable to ``[B, S]``; None: not known."""


class Memory:
    """What graphs have said of the embeddings that they returned, while those live."""

    def __init__(self) -> None:
        self._lock = lock()
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def note(self, embeddings: Tensor, visual: Mask) -> None:
        """Remember which tokens of ``embeddings [B, S, C]`` are visual."""
        if embeddings.is_inference() and not isinstance(visual, Tensor):
            return  # images may be written into it unseen: it counts no writes
        with self._lock:
            self._known[embeddings] = _writes(embeddings), visual

    def of(self, embeddings: Tensor) -> Mask:
        """Which tokens are visual; not known any more once the tensor is written to."""
        with self._lock:
            writes, visual = self._known.get(embeddings, (-1, None))
        return visual if writes == _writes(embeddings) else None


def _writes(tensor: Tensor) -> int:
    """How often a tensor was written to."""
    return 0 if tensor.is_inference() else tensor._version


MEMORY = Memory()


class TokenKinds:
    """The kinds of tokens of one Dynamo graph, evaluated for the arguments of a call.

    Args:
        gm: the graph.
        width: channels C of results ``[B, S, C]`` that are worth a word; None: any.
    """

    def __init__(self, gm: fx.GraphModule, width: int | None = None) -> None:
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
            if width in (None, (shape_of(node) or (None,))[-1])
        ]
        self._written = [
            (index, flow.kinds[node])
            for node, index in self._position.items()
            if flow.kinds.get(node, {Given(index)}) != {Given(index)}
        ]

    @classmethod
    def of_copy(cls, gm: fx.GraphModule) -> TokenKinds:
        """Of a graph that a compiler takes over, and changes."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        return cls(fx.GraphModule(gm, graph))

    def run(self, call: Callable[..., Any], args: Sequence[Any]) -> Any:
        """``call(*args)``, the graph, with a word about every result that carries tokens."""
        # Before the call: it may write to its arguments.
        told = [self.visual(kinds, args) for _, kinds in (*self._returned, *self._written)]
        results = call(*args)
        carriers = [results[i] for i, _ in self._returned] + [args[i] for i, _ in self._written]
        for embeddings, visual in zip(carriers, told, strict=True):
            if visual is not None:
                MEMORY.note(embeddings, visual)
        return results

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
        try:
            return _Call(self._gm, self._sizes, self._position, args).any_of(kinds)
        except Exception:  # no kind of tokens is worth a model that does not run
            log.info("visual tokens could not be told apart", exc_info=True)
            return None


class Prompts:
    """The visual tokens in the prompts of a graph whose caches are packed.

    Args:
        gm: the Dynamo graph.
        sites: whose caches are packed.
        sinks: first tokens, which are not coded.
    """

    def __init__(self, gm: fx.GraphModule, sites: Sequence[PlannedSite], sinks: int) -> None:
        self._sinks = sinks
        self._kinds: Kinds | str = "not a first prefill"
        self._reader: TokenKinds | None = None
        first = sites[0].cached.k if sites else None
        if first is not None and first.past is None:
            self._kinds = find_visual(gm.graph, first.new)
            shapes = map(shape_of, hidden_states(gm.graph, first.new))
            self._reader = TokenKinds(gm, next((shape[-1] for shape in shapes if shape), None))

    @property
    def unknown(self) -> str:
        """Why it is not known which tokens are visual, if it is not."""
        if isinstance(self._kinds, str):
            return self._kinds
        return "embeddings that no compiled graph has made"

    def mask(self, args: Sequence[Any], batch: int, length: int) -> Mask:
        """Which of the tokens are visual, ``[B, S]``; False: none; None: not known.

        Raises:
            ValueError: a mask was given that does not fit (``given.py``).
        """
        given = given_mask()
        if given is not None:
            return fitted_mask(given, batch, length)
        if isinstance(self._kinds, str) or self._reader is None:
            return False if self._kinds == NO_IMAGE else None
        mask = self._reader.visual(self._kinds, args)
        return mask.expand(batch, length) if isinstance(mask, Tensor) else mask

    def visual(self, args: Sequence[Any], batch: int, length: int) -> Mask:
        """The same; False if no token of the mask is visual. Waits for the device."""
        mask = self.mask(args, batch, length)
        return False if isinstance(mask, Tensor) and not bool(mask.any()) else mask

    def have_visual(self, args: Sequence[Any]) -> bool:
        """Whether visual tokens will be coded."""
        given = given_mask()
        if given is not None:
            return bool((given.sum(-1) > self._sinks).any())
        if isinstance(self._kinds, str) or self._reader is None:
            return False
        if not self._reader.may_be_visual(self._kinds, args):
            return False
        mask = self._reader.visual(self._kinds, args)
        return isinstance(mask, Tensor) and bool((mask.sum(-1) > self._sinks).any())

    def run(self, call: Callable[..., Any], args: Sequence[Any]) -> Any:
        """``call(*args)``, the graph; see :meth:`TokenKinds.run`."""
        return call(*args) if self._reader is None else self._reader.run(call, args)


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
            value = attribute(self.gm, str(node.target))
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
