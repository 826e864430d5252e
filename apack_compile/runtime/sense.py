"""Measure the sensitivity of every layer: run a prefill again, with gradients.

Of each cache tensor all but the last tokens become a leaf, so that gradients stop there: what is
differentiated is the work of the last tokens on a given cache, which is what decode does.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..codec.rotation import Turn
from ..codec.sensitivity import Sensitivity
from ..passes.find_writes import is_written
from ..passes.plan import PlannedSite
from .replay import Replay, Unmeasured, Work
from .saved import SavedTails, nodes_by_token

DRAWS = 4
"""Tokens drawn for each prediction: each is a pass backwards through the prompt."""

RECALL_DRAWS = 1
"""The same where the last tokens are repeated, which counts less."""

RECALL = 0.25
"""Weight of the work of repeated tokens, to 1 for the prompt's own."""


def measure(
    gm: fx.GraphModule, args: Sequence[Any], sites: Sequence[PlannedSite],
    turns: Sequence[Turn | None], coded: Tensor, window: int, recall: bool = False,
) -> list[Sensitivity]:  # fmt: skip
    """The sensitivity of each site.

    Args:
        gm: the Dynamo graph of a prefill.
        args: its arguments.
        sites: the sites whose cache is packed.
        turns: the rotation of each site's keys.
        coded: ``[B, S]`` bool: tokens that the codes will hold, were they far behind.
        window: tokens right before the last ones that stay exact.
        recall: whether the last tokens repeat pieces of the prompt.

    Raises:
        Unmeasured: and why.
    """
    if any(n.op == "placeholder" and is_written(n) for n in gm.graph.nodes):
        raise Unmeasured("the graph writes to its inputs")
    work = Work.of(gm, sites, coded, window, recall)
    split = work.split
    past_turns = [split.turn(t) for t in turns]
    budget = _Budget(coded.device)
    nodes = nodes_by_token(gm, list(sites))
    saved = SavedTails(nodes, split.length, split.tail, budget.spend)
    probe = _Probe(work, saved)
    rounds = RECALL_DRAWS if recall else DRAWS
    draws = []
    with torch.inference_mode(False), torch.enable_grad():
        plain = detached(args)
        budget.ignore([*plain, *gm.parameters(), *gm.buffers()])
        try:
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
                probe.run(*plain)
                assert probe.seen is not None
                values = split.of_asked(probe.seen).float()
            leaves = [probe.leaves[u] for u in work.updates]
            queries = rounds * len(values)
            own = torch.Generator(values.device).manual_seed(0)  # the user's stays as it is
            for last in [False] * (rounds - 1) + [True]:
                grads = torch.autograd.grad(
                    work.outcome.surprise(values, own), leaves, retain_graph=not last
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
    found = [reduce(operator.add, layer) for layer in zip(*draws, strict=True)]
    if not all(s.is_finite for s in found):
        raise Unmeasured("gradients are not finite")
    return found


@dataclass(frozen=True)
class Measured:
    """The sensitivity of each layer for two kinds of work.

    Attributes:
        prose: to go on with the prompt.
        recall: to repeat pieces of it. Without it codes drop what the model looks tokens up by.
    """

    prose: list[Sensitivity]
    recall: list[Sensitivity]

    @property
    def share(self) -> float:
        """What brings recall to its weight."""
        prose, recall = (sum(s.trace for s in layers) for layers in (self.prose, self.recall))
        return RECALL * prose / recall if recall > 0 else 0.0

    @property
    def mixed(self) -> list[Sensitivity]:
        """What codes are fitted with."""
        share = self.share
        return [a + b.scaled(share) for a, b in zip(self.prose, self.recall, strict=True)]

    def corrected(self, factors: Sequence[tuple[float, float]]) -> list[Sensitivity]:
        """:attr:`mixed`, with those of prose multiplied layer by layer, keys and values apart."""
        share = self.share
        return [
            replace(a, k=a.k * k, v=a.v * v) + b.scaled(share)
            for a, b, (k, v) in zip(self.prose, self.recall, factors, strict=True)
        ]


class _Probe(Replay):
    """Has leaves in the place of all but the last tokens of the cache."""

    def __init__(self, work: Work, saved: SavedTails) -> None:
        super().__init__(work)
        self.saved = saved
        self.leaves: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As the graph says."""
        self.saved.node = n
        return super().run_node(n)

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


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Bug: what torch holds for later was not counted, so that a second fit found too little.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) << 10  # free, and what the system would give back
    except (OSError, StopIteration, ValueError):  # not every system says
        return UNKNOWN_FREE


def detached(args: Sequence[Any]) -> list[Any]:
    """Arguments that autograd may record and that need no gradient."""
    return [_detached(a) for a in args]


def _detached(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.is_inference() else value.detach()
