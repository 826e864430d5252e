r"""Check the predicted sensitivity of every layer by measurement: code one side, look what it does.

The Fisher information predicts what errors d of the coded tokens cost (``codec/sensitivity.py``):

    cost  ~  1/2 sum_h tr(M_h C_h),    C_h = mean of d d^T over the coded tokens of KV head h

which leaves out that errors of tokens and heads add up, and higher orders. So keys, then values, of
one layer at a time are coded with a trial code, and what the last tokens predict is compared
(:class:`~apack_compile.runtime.replay.Outcome`). The caches of all layers above stay as they were:
only the last tokens see the coded one.

The graph is run up to the layer once for all trials, and resumed from there for each.

In models of 16 bits all that is computed after a change is rounded differently, however small it
was, which costs more than coding most layers does; the less, the fewer layers follow. So for every
``EVERY``-th layer keys are also changed by no more than their last bit, and what that costs is told
with each trial; between these layers, by their distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from ..codec import Code
from ..codec.rotation import Turn
from ..codec.sensitivity import Sensitivity
from ..lower.values import is_mapped
from ..passes.find_writes import written
from ..passes.plan import PlannedSite
from .replay import Replay, Split, Unmeasured, Work
from .sense import detached


@dataclass(frozen=True)
class Trial:
    """The cost of coding one side of one layer alone.

    The KL of the predictions in nats; half the squared change of the last hidden state in graphs
    that give no logits.

    Attributes:
        predicted: by the Fisher information.
        measured: by running the model on the coded cache.
        rounding: what a change in the last bit costs, in models of 16 bits.
    """

    predicted: float
    measured: float
    rounding: float = 0.0

    @property
    def cost(self) -> float:
        """That of coding alone."""
        return self.measured - self.rounding


EVERY = 4
"""Layers from one whose rounding is measured to the next."""


def calibrate(
    gm: fx.GraphModule, args: Sequence[Any], sites: Sequence[PlannedSite],
    turns: Sequence[Turn | None], coded: Tensor, window: int,
    sensitivities: Sequence[Sensitivity], codes: Sequence[tuple[Code, Code]],
    step: Callable[[int, int], None],
) -> list[tuple[Trial, Trial]]:  # fmt: skip
    """A trial for the keys and one for the values of each site.

    Args:
        gm, args, sites, turns, coded, window: as for
            :func:`~apack_compile.runtime.sense.measure`.
        sensitivities: what that measured, on the same arguments.
        codes: trial codes of keys and values of each site.
        step: called with the number of trials done and their number in all.

    Raises:
        Unmeasured: and why.
    """
    work = Work.of(gm, sites, coded, window, False)
    split = work.split
    sides = dict(zip(work.updates, (code for pair in codes for code in pair), strict=False))
    with torch.inference_mode(False), torch.no_grad():
        plain = detached(args)
        try:
            recording = _Recording(work)
            recording.run(*plain)
            base = _Resumed(work, recording.past, True)
            base.run(*plain)
            known = _agree(recording.seen, base.seen)
            if not known:  # layers whose cache is not packed read tokens that were not computed
                base = _Resumed(work, recording.past, False)
                base.run(*plain)
            assert base.seen is not None
            keys = {site.cached.k.node: number for number, site in enumerate(sites)}
            trials = _Trials(work, recording.past, sides, keys, base.seen, step, known)
            trials.run(*plain)
        except torch.OutOfMemoryError as error:
            raise Unmeasured("out of memory") from error
    found = []
    for number, (site, turn, metric) in enumerate(zip(sites, turns, sensitivities, strict=True)):
        k, v = site.cached.k.node, site.cached.v.node
        k_cost = _predicted(metric.k, trials.errors[k], split, split.turn(turn))
        v_cost = _predicted(metric.v, trials.errors[v], split, None)
        rounding = _between(trials.rounding, number)
        found.append(
            (Trial(k_cost, trials.costs[k], rounding), Trial(v_cost, trials.costs[v], rounding))
        )
    return found


class _Recording(Replay):
    """Remembers the cache before the last tokens."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.past: dict[fx.Node, Tensor] = {}

    def cached(self, n: fx.Node, value: Tensor) -> Tensor:
        """As it is."""
        self.past[n] = value[:, :, : -self.tail]
        return value


class _Resumed(Replay):
    """The rest of a graph, after one of its cache tensors was coded."""

    env: dict[fx.Node, Any]

    def __init__(self, work: Work, past: dict[fx.Node, Tensor], known: bool) -> None:
        super().__init__(work, known)
        self.past = past
        self.lent: set[int] = set()

    def cached(self, n: fx.Node, value: Tensor) -> Tensor:
        """What it was before anything was coded, and the last tokens."""
        return self.with_past(value, self.past[n])

    def run_node(self, n: fx.Node) -> Any:
        """As the graph says; storage that it writes to is copied first, for the other trials."""
        for target in written(n):
            for tensor in tree_leaves(self.env.get(target)):
                if isinstance(tensor, Tensor):
                    self._own(tensor.untyped_storage())
        return super().run_node(n)

    def _own(self, storage: torch.UntypedStorage) -> None:
        """Give all tensors in this storage another one, if other trials need it as it is."""
        if storage.data_ptr() not in self.lent:
            return
        copy = storage.clone()

        def moved(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() != storage.data_ptr():
                return x
            return x.new_empty(0).set_(copy, x.storage_offset(), x.shape, x.stride())

        self.env = {node: tree_map_only(Tensor, moved, value) for node, value in self.env.items()}

    def resume(self, env: dict[fx.Node, Any], after: fx.Node) -> Tensor:
        """The value of the node watched, given the values of all nodes that are still needed."""
        # Bug: what a vmap leaves that is over (masks of transformers 4) has no storage.
        self.env = {node: value for node, value in env.items() if not is_mapped(value)}
        values = tree_leaves(list(self.env.values()))
        self.lent = {v.untyped_storage().data_ptr() for v in values if isinstance(v, Tensor)}
        nodes = iter(self.module.graph.nodes)
        for node in nodes:
            if node is after:
                break
        for node in nodes:
            self.env[node] = self.run_node(node)
            for dead in self.user_to_last_uses.get(node, ()):
                self.env.pop(dead, None)
            if self.seen is not None:
                return self.seen
        raise AssertionError(f"{self.watched} does not depend on {after}")


class _Trials(Replay):
    """Codes one cache tensor after the other, and each time runs the rest of the graph."""

    def __init__(
        self, work: Work, past: dict[fx.Node, Tensor], sides: dict[fx.Node, Code],
        keys: dict[fx.Node, int], base: Tensor, step: Callable[[int, int], None], known: bool,
    ) -> None:  # fmt: skip
        super().__init__(work, known)
        self.known = known
        self.past, self.sides, self.keys, self.step = past, sides, keys, step
        self.values = work.split.of_asked(base)
        self.errors: dict[fx.Node, Tensor] = {}
        self.costs: dict[fx.Node, float] = {}
        self.rounding: dict[int, float] = {}

    def cached(self, n: fx.Node, value: Tensor) -> Tensor:
        """As it was; on the way, the trial."""
        past, code = self.past[n], self.sides[n]
        number = self.keys.get(n)
        if past.dtype.itemsize == 2 and number is not None and self._is_rounded(number):
            ulp = torch.finfo(past.dtype).eps * torch.tensor([1.0, -1.0], device=past.device)
            nudged = past * (1 + ulp.repeat(past.shape[3])[: past.shape[3]])
            self.rounding[number] = self._cost(n, value, nudged.to(past.dtype))
        params = code.on(past.device)
        payload = code.layout.encode(past, params)
        decoded = code.layout.decode(payload, params, past.dtype)
        coded = self.work.split.coded.to(past.device)
        changed = torch.where(coded[:, None, :, None], decoded, past)
        self.errors[n] = changed - past
        self.costs[n] = self._cost(n, value, changed)
        self.step(len(self.costs), len(self.sides))
        return self.with_past(value, past)

    def _is_rounded(self, number: int) -> bool:
        """Every so many layers, and in the last one."""
        return number % EVERY == 0 or number == max(self.keys.values())

    def _cost(self, n: fx.Node, value: Tensor, past: Tensor) -> float:
        """What another cache before the last tokens costs."""
        rest = _Resumed(self.work, self.past, self.known)
        result = rest.resume({**self.env, n: self.with_past(value, past)}, n)
        return self.work.outcome.cost(self.values, self.work.split.of_asked(result))


FAR = 0.05
"""Relative difference from which results are not those of the same model: rounding is less."""


def _agree(full: Tensor | None, partly: Tensor | None) -> bool:
    """Whether the last tokens come out the same where only they were computed."""
    assert full is not None and partly is not None
    a, b = (x[:, -min(full.shape[1], partly.shape[1]) :].float() for x in (full, partly))
    return bool((a - b).norm() <= FAR * a.norm())


def _between(known: dict[int, float], number: int) -> float:
    """The value at a number, from those at numbers below and above, by their distance."""
    if not known:
        return 0.0
    low = max((i for i in known if i <= number), default=min(known))
    high = min((i for i in known if i >= number), default=low)
    part = (number - low) / max(high - low, 1)
    return known[low] + part * (known[high] - known[low])


def _predicted(metric: Tensor, errors: Tensor, split: Split, turn: Turn | None) -> float:
    """The cost that the Fisher information expects of ``errors [B, H, S, D]``."""
    errors = errors.float() if turn is None else turn.undo(errors.float())
    flat = errors.transpose(0, 1).flatten(1, 2)  # [H, B * S, D]; zero where nothing is coded
    cov = (flat.mT @ flat).double() / int(split.coded.sum())
    return 0.5 * float((metric * cov).sum())
