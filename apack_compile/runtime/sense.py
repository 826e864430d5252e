"""Measure the sensitivity of every layer: run a prefill again, with gradients.

Of each cache tensor all but the last tokens become a leaf, so that gradients stop there: what is
differentiated is the work of the last tokens on a given cache, which is what decode does.

Twice: once the last tokens are the prompt's own, once they repeat pieces of it. Prose is mostly
predicted from what is near; what is asked of a long context later is what it said, word by word.
Without the second run codes drop what the model looks tokens up by (docs/quality.md, "Recall").
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from ..codec.rotation import Turn
from ..codec.sensitivity import Sensitivity
from ..passes.ancestry import as_networkx
from ..passes.find_weights import hidden_states
from ..passes.find_writes import is_written
from ..passes.plan import PlannedSite
from .replay import Outcome, Replay, Split, Unmeasured, updates_of

DRAWS = 4
"""Tokens drawn for each prediction."""

PIECE = 64
"""Tokens that are repeated together."""

RECALL = 0.5
"""Weight of what repeated tokens say, to 1 for the prompt's own."""


def measure(
    gm: fx.GraphModule, args: Sequence[Any], sites: Sequence[PlannedSite],
    turns: Sequence[Turn | None], coded: Tensor, window: int,
) -> list[Sensitivity]:  # fmt: skip
    """The sensitivity of each site.

    Args:
        gm: the Dynamo graph of a prefill.
        args: its arguments.
        sites: the sites whose cache is packed.
        turns: the rotation of each site's keys.
        coded: ``[B, S]`` bool: tokens that the codes will hold, were they far behind.
        window: tokens right before the last ones that stay exact.

    Raises:
        Unmeasured: and why.
    """
    if any(n.op == "placeholder" and is_written(n) for n in gm.graph.nodes):
        raise Unmeasured("the graph writes to its inputs")
    split, outcome = Split.of(coded, window), Outcome.of(gm.graph, sites)
    own = _Work(gm, args, sites, turns, split, outcome)
    prose, recall = own.gradients(None), own.gradients(Recall.of(split))
    found = [
        a + b.scaled(RECALL * _total(prose) / max(_total(recall), 1e-30))
        for a, b in zip(prose, recall, strict=True)
    ]
    if not all(s.is_finite for s in found):
        raise Unmeasured("gradients are not finite")
    return found


def _total(layers: Sequence[Sensitivity]) -> float:
    return sum(s.trace for s in layers)


@dataclass(frozen=True)
class Recall:
    """The last tokens repeat others.

    Attributes:
        sources: ``[tail]`` int64: which tokens.
    """

    sources: Tensor

    @classmethod
    def of(cls, split: Split) -> Recall:
        """Pieces evenly spread over the tokens that a code will hold."""
        coded = split.coded.all(0).nonzero()[:, 0]  # of every sequence
        if not len(coded):
            coded = split.coded.any(0).nonzero()[:, 0]
        pieces = max(split.tail // PIECE, 1)
        length = split.tail // pieces
        first, room = int(coded[0]), max(int(coded[-1]) + 1 - int(coded[0]) - length, 0)
        at = torch.arange(split.tail, device=coded.device)
        piece = at // length
        start = first + room * (2 * piece + 1) // (2 * pieces)
        return cls((start + at % length).clamp(max=split.coded.shape[1] - 1))

    def apply(self, stream: Tensor) -> Tensor:
        """Embeddings ``[B, S, C]`` with other last tokens."""
        return torch.cat([stream[:, : -len(self.sources)], stream[:, self.sources]], 1)


@dataclass(frozen=True)
class _Work:
    """The work of the last tokens of one prefill, to be differentiated."""

    gm: fx.GraphModule
    args: Sequence[Any]
    sites: Sequence[PlannedSite]
    turns: Sequence[Turn | None]
    split: Split
    outcome: Outcome

    def gradients(self, recall: Recall | None) -> list[Sensitivity]:
        """The sensitivity of each site.

        Raises:
            Unmeasured: and why.
        """
        gm, split = self.gm, self.split
        past_turns = [split.turn(t) for t in self.turns]
        updates = updates_of(self.sites)
        probe = _Probe(gm, updates, split.tail, self.outcome.node)
        if recall is not None:
            flow = as_networkx(gm.graph)
            probe.recall = hidden_states(gm.graph, flow, self.sites[0].cached)[0], recall
        budget = _Budget(split.coded.device)
        draws = []
        with torch.inference_mode(False), torch.enable_grad():
            plain = detached(self.args)
            budget.ignore([*plain, *gm.parameters(), *gm.buffers()])
            try:
                with torch.autograd.graph.saved_tensors_hooks(budget.spend, _same):
                    probe.run(*plain)
                    assert probe.seen is not None
                    values = split.of_asked(probe.seen).float()
                leaves = [probe.leaves[u] for u in updates]
                queries = DRAWS * len(values)
                own = torch.Generator(split.coded.device).manual_seed(0)  # the user's stays
                for last in [False] * (DRAWS - 1) + [True]:
                    grads = torch.autograd.grad(
                        self.outcome.surprise(values, own), leaves, retain_graph=not last
                    )
                    draws.append(
                        [
                            Sensitivity.of(k, v, split.coded, queries, turn)
                            for k, v, turn in zip(grads[::2], grads[1::2], past_turns, strict=True)
                        ]
                    )
            except torch.OutOfMemoryError as error:
                raise Unmeasured("out of memory") from error
            except RuntimeError as error:
                raise Unmeasured(f"no gradients: {str(error).splitlines()[0]}") from error
        return [reduce(operator.add, layer) for layer in zip(*draws, strict=True)]


class _Probe(Replay):
    """Has leaves in the place of all but the last tokens of the cache."""

    def __init__(
        self, gm: fx.GraphModule, updates: Sequence[fx.Node], tail: int, watched: fx.Node
    ) -> None:
        super().__init__(gm, updates, tail, watched)
        self.leaves: dict[fx.Node, Tensor] = {}
        self.recall: tuple[fx.Node, Recall] | None = None

    def run_node(self, n: fx.Node) -> Any:
        """As :class:`Replay`; the last embeddings may repeat others."""
        value = super().run_node(n)
        return self.recall[1].apply(value) if self.recall and n is self.recall[0] else value

    def cached(self, n: fx.Node, value: Tensor) -> Tensor:
        """A leaf and the last tokens."""
        self.leaves[n] = value[:, :, : -self.tail].detach().requires_grad_()
        return self.with_past(value, self.leaves[n])


UNKNOWN_FREE = 8 << 30
"""Bytes that are taken to be free where the system does not say."""


class _Budget:
    """Lets autograd keep at most half of the memory that is free."""

    def __init__(self, device: torch.device) -> None:
        self.left = _free_bytes(device) // 2
        self.seen: set[int] = set()

    def ignore(self, values: Sequence[Any]) -> None:
        """What is there anyway costs nothing."""
        tensors = (v for v in values if isinstance(v, Tensor))
        self.seen.update(t.untyped_storage().data_ptr() for t in tensors)

    def spend(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.left -= storage.nbytes()
            if self.left < 0:
                raise Unmeasured("too little memory for gradients of so long a prompt")
        return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Bug: what torch holds for later was not counted, so that a second fit found too little.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not every system says
        return UNKNOWN_FREE


def detached(args: Sequence[Any]) -> list[Any]:
    """Arguments that autograd may record and that need no gradient."""
    return [_detached(a) for a in args]


def _detached(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.is_inference() else value.detach()
