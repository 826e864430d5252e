"""What the prefills of several batches tell of a model's layers: gathered, then fitted once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

from torch import Tensor, fx

from ..backend import NO_ATTENTION
from ..codec import Code
from ..codec.fit import fit_transform
from ..codec.recipe import Recipe
from ..codec.sensitivity import Sensitivity
from ..options import Options
from ..passes.plan import make_plan
from ..runtime.calibrate import Trial
from ..runtime.graph import CROSS_ATTENTION, PackedGraph
from ..runtime.replay import Unmeasured
from ..runtime.sense import Measured
from ..runtime.stats import GraphRecord
from ..runtime.study import Study
from ..runtime.visual import TokenKinds
from .keep import Identity
from .layer import Fit, LayerProfile, Profiles
from .learn import by_shape, evidence, fit_layers, reach_of

TRIAL = Recipe(ratio=8.0)
"""The trial code: two bits a number."""

LEAST, MOST = 1 / 8, 64.0
"""A measurement changes a predicted sensitivity at least and at most by these factors. The values
of SmolLM2's first layer cost 39 times what is predicted; at most 8 were allowed once, and codes at
ratio 16 had too few bits there."""

NOISE = 0.3
"""Of what rounding costs: a cost that differs by less from the predicted one says nothing."""


class FitError(ValueError):
    """Codes cannot be fitted from what was given; says why."""


@dataclass
class Group:
    """The layers of one kind in one graph, and what has been seen of them.

    Attributes:
        kind: their numbers among the sites of the graph (:attr:`PackedGraph.kinds`).
        graph, args, study: of the first prefill whose sensitivity was measured, else of the first.
        profiles: of the layers; known to this session alone.
        weights: that name them.
        identity: by what they are known on disk.
        measured: sensitivities of each prefill, where they could be measured.
        reason: why they could not, last.
        trials: what coding one side of one layer costs, once :meth:`calibrate` was called.
    """

    kind: tuple[int, ...]
    graph: LearningGraph
    args: tuple[Any, ...]
    study: Study
    profiles: list[LayerProfile]
    weights: list[Tensor]
    identity: Identity | str
    measured: list[Measured] = field(default_factory=list)
    reason: str = ""
    trials: list[tuple[Trial, Trial]] | None = None

    def add(self, graph: LearningGraph, args: tuple[Any, ...], study: Study) -> None:
        """Add a prefill."""
        for index in self.each_once():
            self.profiles[index].take(study.lessons[self.kind[index]])
        own = self.kind == graph.studies.own
        measured = graph.studies.sense(args, study) if own else CROSS_ATTENTION
        if isinstance(measured, str):
            self.reason = measured
            return
        if not self.measured:
            self.graph, self.args, self.study = graph, args, study
        self.measured.append(measured)

    def each_once(self) -> list[int]:
        """Numbers of the layers, each once: sites may share one."""
        first = {id(p): i for i, p in reversed(list(enumerate(self.profiles)))}
        return sorted(first.values())

    @property
    def sensitivities(self) -> list[Sensitivity] | str:
        """The mean over the prefills, scaled to what was measured; or why there is none.

        Only relations between layers count, so that the unit is free.
        """
        if not self.measured:
            return self.reason
        if self.trials is None:
            each = [_shares(prefill.mixed) for prefill in self.measured]
        else:
            factors = [(_ratio(k), _ratio(v)) for k, v in self.trials]
            each = [_shares(prefill.corrected(factors)) for prefill in self.measured]
        return [reduce(operator.add, layer) for layer in zip(*each, strict=True)]

    def calibrate(self, step: Callable[[int, int], None]) -> None:
        """Measure what coding each side of each layer costs.

        Raises:
            Unmeasured: and why.
        """
        if not self.measured:
            raise Unmeasured(self.reason)
        codes: dict[int, tuple[Code, Code]] = {}
        for indices in by_shape(self.profiles, self.each_once()):
            group = [self.profiles[i] for i in indices]
            try:
                found = fit_transform(evidence(group, ""), group[0].dims, TRIAL, reach_of(group))
            except ValueError as error:
                raise Unmeasured(str(error)) from error
            codes |= {id(p): pair for p, pair in zip(group, found, strict=True)}
        self.trials = self.graph.studies.calibrate(
            self.args, self.study, self.measured[0], [codes[id(p)] for p in self.profiles], step
        )

    def fit(self, options: Options) -> list[Fit]:
        """Codes of all layers. Nothing is changed.

        Raises:
            FitError: too few tokens were seen.
            ValueError: no code is that small.
        """
        found = self.sensitivities
        fits: dict[int, Fit] = {}
        for profile in self.profiles:
            if not profile.is_ready(options):
                raise FitError(
                    f"the batches hold {profile.reason.partition(' that ')[0]}: give more or "
                    f"longer ones, or lower the option fit_tokens={options.fit_tokens!r}"
                )
        for indices in by_shape(self.profiles, self.each_once()):
            group = [self.profiles[i] for i in indices]
            known = found if isinstance(found, str) else [found[i] for i in indices]
            made = fit_layers(group, known, options)
            fits |= {id(p): fit for p, fit in zip(group, made, strict=True)}
        return [fits[id(p)] for p in self.profiles]


def _shares(layers: Sequence[Sensitivity]) -> list[Sensitivity]:
    """Sensitivities of one prefill relative to their sum: every prefill counts the same."""
    total = sum(layer.trace for layer in layers)
    return [layer.scaled(1 / total) for layer in layers] if total > 0 else list(layers)


def _ratio(trial: Trial) -> float:
    """Measured over predicted cost, within limits."""
    cost = max(trial.cost, 0.0)
    if trial.predicted <= 0 or abs(cost - trial.predicted) < NOISE * trial.rounding:
        return 1.0
    return min(max(cost / trial.predicted, LEAST), MOST)


class LearningGraph(PackedGraph):
    """Takes part in a session: every prefill runs uncompiled and is learnt from."""

    session: Session

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """The results of the Dynamo graph; caches are packed without loss."""
        return self.studies.prompts.run(self._learn, args)

    def _learn(self, *args: Any) -> tuple[Any, ...]:
        study = self.studies.run(args, self.boundary.layouts(args))
        self.session.add(self, args, study)
        return self.pack(args, study, self._refs([]))


class Session:
    """A Dynamo backend that compiles nothing and learns from every prefill.

    Args:
        options: the user's.

    Attributes:
        groups: what was seen of the layers of each kind of graph.
        reasons: why other graphs pack no cache.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.groups: dict[tuple[int, ...], Group] = {}
        self.reasons: dict[str, None] = {}
        self.prefills = 0
        self._profiles = Profiles()

    def backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Called by Dynamo."""
        plan = make_plan(gm.graph)
        if not plan.having("encode"):
            reasons = [skip.reason for skip in plan.skipped] or [NO_ATTENTION]
            self.reasons |= dict.fromkeys(reasons)
            kinds = TokenKinds(gm)
            return lambda *args: kinds.run(gm.forward, args)
        options = replace(self.options, inner="eager")
        graph = LearningGraph(gm, plan, options, {}, GraphRecord())
        graph.session = self
        return graph

    def add(self, graph: LearningGraph, args: tuple[Any, ...], study: Study) -> None:
        """Add a prefill.

        Raises:
            FitError: the graph does not show the weights that name the layers.
        """
        self.prefills += 1
        every = [w for w in graph.weights(args) if w is not None]
        layers = graph.profiles(args, self._profiles)
        if len(every) < len(layers):
            raise FitError(
                "the graph does not show the weights that make its keys: codes could not be told "
                "apart by layer"
            )
        for kind in graph.kinds:
            profiles = [layers[i] for i in kind]
            key = tuple(map(id, profiles))
            if key not in self.groups:
                weights, identity = [every[i] for i in kind], graph.identity(args, kind)
                self.groups[key] = Group(kind, graph, args, study, profiles, weights, identity)
            self.groups[key].add(graph, args, study)
