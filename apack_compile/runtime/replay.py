"""Interpret the graph of a prefill as decode: the last tokens work on a cache of those before.

Dynamo graphs are run node by node. Of each cache tensor all but the last tokens are replaced: by
leaves of autograd (``sense.py``), or by what a code makes of them (``calibrate.py``). Where the
graph computes logits of the last token only (``logits_to_keep=1``), it is made to compute them for
all of the last tokens; where another graph computes them, the last hidden state stands for them.

The last tokens are the prompt's own, or repeat pieces of it. Prose is mostly predicted from what is
near; what is asked of a long context later is what it said, word by word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from ..codec.rotation import Turn
from ..passes.ancestry import as_networkx
from ..passes.base import output_of, same_size, value_of
from ..passes.find_weights import hidden_states
from ..passes.plan import PlannedSite
from .tail import LINEAR, Tail

QUERIES = 256
"""Tokens at the end of a prefill whose predictions are looked at."""

FEWEST = 32
"""Fewer queries than this say too little."""

PIECE = 64
"""Tokens of the prompt that are repeated together."""

ROWS = 32
"""Queries that are compared at a time, in float64."""


class Unmeasured(Exception):
    """Something about the sensitivity could not be measured; says why."""


@dataclass(frozen=True)
class Split:
    """Which tokens of a prompt are cache and which are work on it.

    Attributes:
        tail: tokens at the end that work.
        coded: ``[B, S - tail]`` bool: tokens before them that a code would hold.
        asked: ``[B, tail]`` bool: tokens at the end whose predictions count.
    """

    tail: int
    coded: Tensor
    asked: Tensor

    @classmethod
    def of(cls, coded: Tensor, window: int) -> Split:
        """Split a prompt.

        Args:
            coded: ``[B, S]`` bool: tokens that codes would hold, were they far behind.
            window: tokens right before the last ones that stay exact.

        Raises:
            Unmeasured: the prompt is too short.
        """
        batch, length = coded.shape
        tail = min(max(QUERIES // batch, FEWEST), length // 4)
        if tail < FEWEST:
            raise Unmeasured(f"a prompt of {length} tokens is too short")
        past = length - tail
        behind = coded[:, :past].clone()
        behind[:, max(past - window, 0) :] = False
        if int(behind.sum()) < FEWEST * batch:
            raise Unmeasured(f"a prompt of {length} tokens leaves few behind a window of {window}")
        return cls(tail, behind, coded[:, past:])

    @property
    def length(self) -> int:
        """Tokens S of the prompt."""
        return self.coded.shape[1] + self.tail

    def turn(self, turn: Turn | None) -> Turn | None:
        """The rotation of the tokens before the last ones."""
        past = self.coded.shape[1]
        return turn and Turn(turn.cos[:, :past], turn.sin[:, :past], turn.interleaved)

    def pieces(self) -> Tensor:
        """Tokens for the last ones to repeat, evenly spread over those coded: ``[tail]`` int64."""
        coded = self.coded.all(0).nonzero()[:, 0]  # in every sequence
        if not len(coded):
            coded = self.coded.any(0).nonzero()[:, 0]
        count = max(self.tail // PIECE, 1)
        length = self.tail // count
        first, room = int(coded[0]), max(int(coded[-1]) + 1 - int(coded[0]) - length, 0)
        at = torch.arange(self.tail, device=coded.device)
        start = first + room * (2 * (at // length) + 1) // (2 * count)
        return (start + at % length).clamp(max=self.coded.shape[1] - 1)

    def of_asked(self, value: Tensor) -> Tensor:
        """``[B, S, C]``, or of the last tokens only, of the tokens asked: ``[queries, C]``.

        Raises:
            Unmeasured: there are no such tokens.
        """
        if value.shape[1] < self.tail or not bool(self.asked.any()):
            raise Unmeasured("the graph gives no logits of its last tokens")
        return value[:, -self.tail :][self.asked.to(value.device)]


@dataclass(frozen=True)
class Outcome:
    """The node of a graph by which the work of the last tokens is judged.

    Attributes:
        node: ``[B, S, C]``, or of the last tokens only.
        logits: whether these are logits; else they are the last hidden state.
    """

    node: fx.Node
    logits: bool

    @classmethod
    def of(cls, graph: fx.Graph, sites: Sequence[PlannedSite]) -> Outcome:
        """Find it.

        Raises:
            Unmeasured: nothing in the graph depends on the caches.
        """
        flow = as_networkx(graph)
        behind = nx.descendants(flow, sites[0].cached.k.node)
        hidden = [n for n in hidden_states(graph, flow, sites[0].cached) if n in behind]
        if not hidden:
            raise Unmeasured("nothing in the graph depends on its caches")
        channels = value_of(hidden[-1]).shape[2]
        logits = [
            n for n in output_of(graph).all_input_nodes
            if n in behind and _is_logits(value_of(n), channels)
        ]  # fmt: skip
        if not logits:
            return cls(hidden[-1], False)
        return cls(max(logits, key=lambda n: value_of(n).shape[2]), True)

    def surprise(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """A scalar whose gradient g has E[(g . d)^2] = 2 cost, for small changes d of its inputs.

        Log-probabilities of tokens drawn from the model's own predictions (the Fisher
        information of the cache), or products of hidden states with Gaussian noise.

        Args:
            values: of the node, ``[queries, C]``, float32.
            generator: draws.
        """
        if not self.logits:
            noise = torch.empty_like(values).normal_(generator=generator)
            return (values * noise).sum()
        predictions = values.log_softmax(-1)
        drawn = torch.multinomial(predictions.detach().exp(), 1, generator=generator)
        return predictions.gather(1, drawn).sum()

    def cost(self, values: Tensor, changed: Tensor) -> float:
        """Mean over queries of the KL of predictions, or of half the squared change.

        Args:
            values, changed: of the node, ``[queries, C]``.
        """
        total = 0.0
        for want, got in zip(values.split(ROWS), changed.split(ROWS), strict=True):
            a, b = want.double(), got.double()
            if self.logits:
                p, q = a.log_softmax(-1), b.log_softmax(-1)
                total += float((p.exp() * (p - q)).sum())
            else:
                total += 0.5 * float((a - b).square().sum())
        return total / len(values)


def _is_logits(value: Any, channels: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() == 3
        and not same_size(value.shape[2], channels)
    )


@dataclass(frozen=True)
class Work:
    """The work of the last tokens of a prefill on a cache of those before.

    Attributes:
        gm: the Dynamo graph.
        updates: its cache tensors of keys and values, in turn.
        split: which tokens are which.
        outcome: by what the work is judged.
        stream: the first hidden state, ``[B, S, C]``.
        sources: ``[tail]`` int64: the tokens that the last ones repeat; None: they are the
            prompt's own.
    """

    gm: fx.GraphModule
    updates: tuple[fx.Node, ...]
    split: Split
    outcome: Outcome
    stream: fx.Node
    sources: Tensor | None

    @classmethod
    def of(
        cls, gm: fx.GraphModule, sites: Sequence[PlannedSite], coded: Tensor, window: int,
        recall: bool,
    ) -> Work:  # fmt: skip
        """Find out what is what.

        Args:
            gm, sites, coded, window: as for :func:`~apack_compile.runtime.sense.measure`.
            recall: whether the last tokens repeat pieces of the prompt.

        Raises:
            Unmeasured: and why.
        """
        split, outcome = Split.of(coded, window), Outcome.of(gm.graph, sites)
        stream = hidden_states(gm.graph, as_networkx(gm.graph), sites[0].cached)[0]
        updates = tuple(n for site in sites for n in (site.cached.k.node, site.cached.v.node))
        return cls(gm, updates, split, outcome, stream, split.pieces() if recall else None)


class Replay(fx.Interpreter):
    """Runs a graph; :meth:`cached` says what the cache tensors are.

    Args:
        work: what is run, and how it is judged.
        known: whether :meth:`cached` knows all but the last tokens: they are not computed then.

    Attributes:
        seen: the value of the node by which the work is judged.
    """

    def __init__(self, work: Work, known: bool = False) -> None:
        super().__init__(work.gm)
        self.work = work
        self.tail = work.split.tail
        self._of_tail = Tail(work.split.length, self.tail, known)
        self.updates = set(work.updates)
        self.watched = work.outcome.node
        self.seen: Tensor | None = None

    def run_node(self, n: fx.Node) -> Any:
        """As the graph says, but for cache tensors, repeated and the choice of last tokens."""
        if _takes_last_token(n):
            args, _ = self.fetch_args_kwargs_from_env(n)
            return args[0][:, -self.tail :]
        if n is self.watched and self._is_last_product(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            value = n.target(args[0][:, -self.tail :], *args[1:], **kwargs)
        else:
            value = super().run_node(n)
        if n is self.work.stream and self.work.sources is not None:
            value = torch.cat(
                [value[:, : -self.tail], value[:, self.work.sources.to(value.device)]], 1
            )
        if n is self.watched:
            self.seen = value
        return self.cached(n, value) if n in self.updates else value

    def _is_last_product(self, n: fx.Node) -> bool:
        """Whether these are logits that only leave the graph: of all tokens they are large."""
        return (
            self.work.outcome.logits and n.target in LINEAR and [*n.users] == [output_of(n.graph)]
        )

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Those that take most of the time without gradients for all but the last tokens."""
        return self._of_tail.call(target, args, kwargs)

    def cached(self, n: fx.Node, value: Tensor) -> Tensor:
        """The cache tensor ``n``, which the graph made ``value [B, H, S, D]``."""
        return value

    def with_past(self, value: Tensor, past: Tensor) -> Tensor:
        """``value`` with other tokens before the last ones."""
        return torch.cat([past, value[:, :, -self.tail :]], 2)


def _takes_last_token(n: fx.Node) -> bool:
    """``hidden[:, -1:, :]`` of ``[B, S, C]``."""
    if n.op != "call_function" or getattr(n.target, "__name__", "") != "getitem":
        return False
    index = n.args[1]
    if not isinstance(index, tuple) or len(index) < 2 or not isinstance(n.args[0], fx.Node):
        return False
    value = n.args[0].meta.get("example_value")
    everything = slice(None, None, None)
    return (
        isinstance(value, Tensor)
        and value.dim() == 3
        and index[1] == slice(-1, None, None)
        and all(i == everything for i in (index[0], *index[2:]))
    )
