"""Prefills that teach: run uncompiled, with moments of every layer; then again, with gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx

from ..codec import Code
from ..codec.moments import Moments
from ..codec.rotation import Turn
from ..fitting.layer import Lesson
from ..fitting.learn import first_line
from ..options import Options
from ..passes.base import shape_of, value_of
from ..passes.draft import Draft, Interface
from ..passes.plan import Plan, PlannedSite
from ..passes.rewrite_encode import TOLD, collect, prompt_sites
from ..passes.rewrite_unpack import rewrite_unpack
from .arguments import Sizes
from .calibrate import Trial, calibrate
from .replay import Unmeasured
from .sense import Measured, measure
from .visual import Mask, Prompts

log = logging.getLogger(__name__)


class Unprepared(Exception):
    """A graph could not be rewritten, and nothing has run; says why."""


@dataclass(frozen=True)
class Study:
    """What came out of one prefill.

    Attributes:
        interface: what the results are.
        results: of the graph.
        lessons: what it tells of each ``encode`` site.
        visual: which tokens of the prompt are visual.
    """

    interface: Interface
    results: list[Any]
    lessons: tuple[Lesson, ...]
    visual: Mask = None

    @property
    def turns(self) -> list[Turn | None]:
        """The rotation of the keys of each site."""
        return [lesson.turn for lesson in self.lessons]

    @property
    def visible(self) -> list[Tensor | None]:
        """The visible tokens of each site."""
        return [lesson.visible for lesson in self.lessons]


class Studies:
    """Runs the prefills of one graph that teach.

    Args:
        gm: the Dynamo graph.
        plan: what to do with it.
        options: the user's.
        inputs: those of a rewritten graph, for arguments of the Dynamo graph and an interface.

    Attributes:
        sites: whose caches the graph encodes.
        own: numbers of those whose keys are of the same tokens as their queries.
    """

    def __init__(
        self, gm: fx.GraphModule, plan: Plan, options: Options,
        inputs: Callable[[tuple[Any, ...], Interface], Sequence[Any]],
    ) -> None:  # fmt: skip
        self.gm = gm
        self.plan = plan
        self.options = options
        self.sites = plan.having("encode")
        self.own = tuple(i for i, site in enumerate(self.sites) if not site.cached.crosses)
        self._own_sites = tuple(self.sites[i] for i in self.own)
        self._inputs = inputs
        self._sizes = Sizes(gm.graph)
        self.prompts = Prompts(gm, self._own_sites, options.sinks)

    def lengths(self, args: Sequence[Any]) -> list[int]:
        """Tokens of the cache that each ``encode`` site makes."""
        return [self._size(site, 2, args) for site in self.sites]

    def run(self, args: tuple[Any, ...], layouts: tuple[str, ...] = ()) -> Study:
        """Run once without Inductor and without codes.

        Args:
            args: of the Dynamo graph.
            layouts: specs of its packed inputs.

        Raises:
            Unprepared: the graph could not be rewritten.
        """
        lengths = self.lengths(args)
        visual: Mask = None
        if self.own:
            visual = self.prompts.visual(args, self._batch(args), lengths[self.own[0]])
        images = (visual,) if isinstance(visual, Tensor) else ()
        try:
            draft = Draft(self.gm, self.plan, layouts)
            rewrite_unpack(draft)
            collect(draft, self.options.sinks, bool(images), self.options.recipe.weighs)
            gm, interface = draft.finish()
        except Exception as error:
            raise Unprepared(first_line(error)) from error
        with torch.no_grad():
            results = list(gm(*self._inputs((*args, *images), interface)))
        told = results[interface.extra : interface.extra + TOLD * len(self.sites)]
        prompts = prompt_sites(self.sites)
        lessons = []
        for number, (site, length) in enumerate(zip(self.sites, lengths, strict=True)):
            sums, visible, cos, sin, interleaved, weight = told[number * TOLD :][:TOLD]
            turn = Turn.of(cos, sin, interleaved, length)
            k_shape, v_shape = shape_of(site.cached.k.node), shape_of(site.cached.v.node)
            assert k_shape is not None and v_shape is not None
            dims, count = (k_shape[3], v_shape[3]), len(fields(Moments))
            no_image = visual is False and not site.cached.crosses
            of_images = sums[count:] or (() if no_image else None)
            mask = visual if isinstance(visual, Tensor) and site in prompts else None
            lessons.append(
                Lesson(sums[:count], turn, visible, dims, length, of_images, weight, mask)
            )
        return Study(interface, results, tuple(lessons), visual)

    def sense(self, args: tuple[Any, ...], study: Study) -> Measured | str:
        """The sensitivity of each site in :attr:`own`, or why it is not known."""
        if self.plan.handles:
            return "some caches are packed already"
        if self._own_sites[0].cached.k.past is not None:
            return "not a prefill"
        coded, window = self._coded(args, study), self.options.window
        turns = [study.turns[i] for i in self.own]
        try:
            prose = measure(self.gm, args, self._own_sites, turns, coded, window, False)
        except Unmeasured as error:
            return first_line(error)
        try:
            recall = measure(self.gm, args, self._own_sites, turns, coded, window, True)
        except Unmeasured as error:
            log.info("attentionpack: recall is not measured: %s", first_line(error))
            recall = [layer.scaled(0.0) for layer in prose]
        return Measured(prose, recall)

    def calibrate(
        self, args: tuple[Any, ...], study: Study, measured: Measured,
        codes: Sequence[tuple[Code, Code]], step: Callable[[int, int], None],
    ) -> list[tuple[Trial, Trial]]:  # fmt: skip
        """Predicted and measured cost of trial codes of the sites in :attr:`own`.

        See :func:`.calibrate.calibrate`.

        For the prompt's own tokens: what coding one layer alone does to recall is little, other
        layers stand in for it, which are coded as well in the end.

        Raises:
            Unmeasured: and why.
        """
        coded, window = self._coded(args, study), self.options.window
        turns = [study.turns[i] for i in self.own]
        return calibrate(
            self.gm, args, self._own_sites, turns, coded, window, measured.prose, codes, step
        )

    def prompt(self, args: Sequence[Any]) -> tuple[int, int]:
        """Sequences of the prompt, and their tokens, as the first site in :attr:`own` has them."""
        return self._batch(args), self._size(self._own_sites[0], 2, args)

    def _size(self, site: PlannedSite, dim: int, args: Sequence[Any]) -> int:
        return self._sizes.value(value_of(site.cached.k.node).shape[dim], args)

    def _batch(self, args: Sequence[Any]) -> int:
        return self._size(self._own_sites[0], 0, args)

    def _coded(self, args: tuple[Any, ...], study: Study) -> Tensor:
        """Tokens that codes would hold, were they far behind: ``[B, S]`` bool."""
        visible = study.lessons[self.own[0]].visible
        if visible is None:
            first = self._own_sites[0]
            device = value_of(first.cached.k.node).device
            shape = self._batch(args), self._size(first, 2, args)
            visible = torch.ones(shape, dtype=torch.bool, device=device)
        return visible & (visible.cumsum(1) > self.options.sinks)
