"""The callable that Dynamo's bytecode calls for a graph with packed caches.

Each call takes the packed inputs apart, runs the rewritten graph on plain tensors, and makes new
handles of what comes out. Rewritten graphs are made when they are first needed, one for each
combination of codes: a prefill whose layers have no codes yet, in memory or on disk, runs once,
uncompiled, to learn them (``fit``); from then on the compiled graph encodes (``encode``); a graph
with packed inputs attends to them (``decode``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx

from ..codec import CodeRef
from ..codec.fixed import FIXED, fixed_ref
from ..codec.sensitivity import Sensitivity
from ..compat import COMPILING, compile_inner
from ..fitting.file import ProfileError
from ..fitting.keep import Identity, identify, recall, remember
from ..fitting.layer import LEARNING, PROFILES, LayerProfile, Lesson, Profiles
from ..fitting.learn import first_line, learn
from ..fitting.progress import Progress
from ..kernels.kinds import SortedTokens
from ..lower.decode import CUDAGRAPHS
from ..ops.region import CALLER, Caller, config_key
from ..options import Options
from ..passes.base import attribute, shape_of
from ..passes.draft import DenseOutput, Draft, Interface
from ..passes.plan import Plan
from ..passes.rewrite_attend import rewrite_attend
from ..passes.rewrite_encode import rewrite_encode
from ..passes.rewrite_unpack import rewrite_unpack
from .arguments import Dynamics
from .boundary import Boundary
from .kinds import PromptKinds
from .owners import Owners
from .paper import paper_code, paper_sites
from .specialise import Specialised, python_floats
from .stats import GraphRecord
from .stock import on_dense, written_inputs
from .study import Studies, Study, Unprepared

log = logging.getLogger(__name__)

MOST_FLOATS = 8
"""Values of Python floats that a graph is compiled for."""

CROSS_ATTENTION = "cross-attention"
"""Why the sensitivity of a layer is not measured: decode does not add to what it reads."""


class Lowered:
    """One rewriting of the graph and its Inductor artifacts, one for each set of shapes."""

    def __init__(self, gm: fx.GraphModule, interface: Interface, layouts: tuple[str, ...]) -> None:
        self.gm = gm
        self.interface = interface
        self.layouts = layouts
        self.artifacts: list[Specialised] = []
        self.floats: set[tuple[tuple[int, str], ...]] = set()

    def artifact_for(self, inputs: list[Any]) -> Specialised | None:
        """One that holds for the shapes of these inputs."""
        return next((a for a in self.artifacts if a.accepts(inputs)), None)


class PackedGraph:
    """A Dynamo graph with packed caches.

    Args:
        gm: the graph.
        plan: what to do with it.
        options: the user's.
        config: Inductor settings.
        record: where to count.

    Attributes:
        kinds: numbers of the ``encode`` sites whose codes are learnt together: those that attend
            to the queries' own tokens, and those of cross-attention.
    """

    def __init__(
        self, gm: fx.GraphModule, plan: Plan, options: Options,
        config: dict[str, Any],
        record: GraphRecord,
    ) -> None:  # fmt: skip
        self.gm = gm
        self.plan = plan
        self.options = options
        self.config = config
        self.compiler = partial(compile_inner, options.inner, config=config)
        self.owners = Owners(record)
        capture = options.inner == "inductor" and config.get(CUDAGRAPHS, True)
        self.boundary = Boundary(gm, plan, options, self.owners, capture)
        self.studies = Studies(gm, plan, options, partial(self.boundary.inputs, refs=[]))
        self._prompt_kinds = PromptKinds(self.studies, options)
        self._dynamics = Dynamics(gm.graph, plan.handles, plan.fixed, self._prompt_kinds.shape)
        self._caller = Caller(config, config_key(config), self._compiled_region)
        self._lowered: dict[Any, Lowered] = {}
        arguments = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self._positions = {n: i for i, n in enumerate(arguments)}
        self._encode_sites = plan.having("encode")
        own = self.studies.own
        crossing = tuple(i for i in range(len(self._encode_sites)) if i not in own)
        self.kinds = tuple(numbers for numbers in (own, crossing) if numbers)
        self._given_up = False

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """The results of the Dynamo graph, caches packed."""
        self.owners.enter(args, tuple(self.gm.parameters()) if not self.record.runs else ())
        return self.studies.prompts.run(self._packed, args)

    @property
    def record(self) -> GraphRecord:
        """Where to count: of the model whose graph runs."""
        return self.owners.record

    def _compiled_region(self) -> None:
        self.record.compiled_region()

    def _packed(self, *args: Any) -> tuple[Any, ...]:
        if self._given_up:
            return self._dense(args)
        try:
            return self._call(*args)
        except Unprepared as error:
            self._give_up(error)
            return self._dense(args)

    def _call(self, *args: Any) -> tuple[Any, ...]:
        if self.options.codec == "svd" and self._encode_sites:
            return self._factor(args)
        profiles = self.profiles(args, PROFILES)
        if not self._served(profiles, args):
            with LEARNING:  # another thread may be fitting the same layers
                if not self._served(profiles, args):
                    # It reads all weights, so that each is asked for once.
                    identities = [cache(partial(self.identity, args, kind)) for kind in self.kinds]
                    lengths = self.studies.lengths(args)
                    for kind, identity in zip(self.kinds, identities, strict=True):
                        longest = max(lengths[i] for i in kind)
                        recall([profiles[i] for i in kind], identity, self.options, longest)
                    if not self._served(profiles, args):
                        return self._fit(args, profiles, identities)
        self._tell(profiles)
        return self._run(args, self._refs(profiles))

    # Layers --------------------------------------------------------------------------------------

    def profiles(self, args: Sequence[Any], known: Profiles) -> list[LayerProfile]:
        """The profile of each ``encode`` site; none if there is nothing to fit."""
        if self.options.codec != "transform":
            return []
        weights = self.weights(args)
        return [known.layer(w, self, i, self.options) for i, w in enumerate(weights)]

    def weights(self, args: Sequence[Any]) -> list[Tensor | None]:
        """The weight that names the layer of each ``encode`` site, if the graph shows one."""
        nodes = [s.cached.k.weight for s in self._encode_sites]
        return [None if node is None else self._value(node, args) for node in nodes]

    def identity(self, args: Sequence[Any], kind: Sequence[int]) -> Identity | str:
        """By what layers of one kind are known in other processes, or why they are not."""
        sites = [self._encode_sites[i].cached for i in kind]
        return identify(self.gm.graph, sites, partial(self._value, args=args))

    def _value(self, node: fx.Node, args: Sequence[Any]) -> Any:
        """What an input or attribute of the Dynamo graph is."""
        if node.op == "placeholder":
            return args[self._positions[node]]
        return attribute(self.gm, str(node.target))

    def _served(self, profiles: Sequence[LayerProfile], args: tuple[Any, ...]) -> bool:
        visual = self._meets_blind_codes(profiles, args)
        lengths = self.studies.lengths(args)
        return all(p.serves(n, visual) for p, n in zip(profiles, lengths, strict=False))

    def _meets_blind_codes(self, profiles: Sequence[LayerProfile], args: tuple[Any, ...]) -> bool:
        """Whether visual tokens come to layers whose codes were fitted on text alone."""
        blind = any(p.fit is not None and p.fit.is_blind for p in profiles)
        return blind and self.studies.prompts.have_visual(args)

    def _refs(self, profiles: Sequence[LayerProfile]) -> list[CodeRef]:
        """The code of each update that is encoded; exact ones where there is no fit yet."""
        codec = self.options.codec if self.options.codec in FIXED else "exact"
        fitted: dict[fx.Node, CodeRef] = {}
        for planned, profile in zip(self._encode_sites, profiles, strict=False):
            if profile.codes is not None:
                for update, ref in zip(
                    (planned.cached.k, planned.cached.v), profile.codes, strict=True
                ):
                    fitted.setdefault(update.node, ref)
        refs = []
        for update in self.boundary.updates:
            shape = shape_of(update.node)
            assert shape is not None
            refs.append(fitted.get(update.node) or fixed_ref(codec, shape[1], shape[3]))
        return refs

    # Running -------------------------------------------------------------------------------------

    def _fit(
        self, args: tuple[Any, ...], profiles: Sequence[LayerProfile],
        identities: Sequence[Callable[[], Identity | str]],
    ) -> tuple[Any, ...]:  # fmt: skip
        """Run once without Inductor, gather moments, fit, and pack what came out."""
        with Progress("learning codes from this prompt") as progress:
            progress.step("prefill")
            study = self.studies.run(args, self.boundary.layouts(args))

            def sense() -> list[Sensitivity] | str:
                progress.step("measuring sensitivity")
                measured = self.studies.sense(args, study)
                progress.step("fitting")
                return measured if isinstance(measured, str) else measured.mixed

            with torch.inference_mode(False), torch.no_grad():  # codes outlive the call
                for kind, identity in zip(self.kinds, identities, strict=True):
                    layers = [profiles[i] for i in kind]
                    lessons = [study.lessons[i] for i in kind]
                    asked = sense if kind == self.studies.own else lambda: CROSS_ATTENTION
                    if learn(layers, lessons, self.options, asked):
                        remember(layers, identity(), self.options)
        self._tell(profiles)
        self.record.ran("fit")
        refs = self._refs(profiles)
        if any(ref.layout.plane_kinds for ref in refs):
            self._prompt_kinds.tell(study.visual, self.record)
        return self.pack(args, study, refs)

    def pack(self, args: tuple[Any, ...], study: Study, refs: Sequence[CodeRef]) -> tuple[Any, ...]:
        """The results of the Dynamo graph, made of those of an uncompiled prefill."""
        lessons: dict[fx.Node, Lesson] = {}
        for planned, lesson in zip(self._encode_sites, study.lessons, strict=True):
            lessons.setdefault(planned.cached.k.node, lesson)
            lessons.setdefault(planned.cached.v.node, lesson)
        return self.boundary.outputs(args, study.interface, study.results, refs, lessons)

    def _factor(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Run without Inductor, and give every sequence a basis of its own."""
        study = self.studies.run(args, self.boundary.layouts(args))
        dense = {
            recipe.code: study.results[recipe.value]
            for recipe in study.interface.outputs if isinstance(recipe, DenseOutput)
        }  # fmt: skip
        sites = paper_sites(self._encode_sites, study.turns, study.visible)
        refs = [
            paper_code(dense[number], sites[update.node], self.options)
            for number, update in enumerate(self.boundary.updates)
        ]
        self.record.ran("factor")
        return self.pack(args, study, refs)

    def _tell(self, profiles: Sequence[LayerProfile]) -> None:
        """Tell the report what is new of the layers."""
        state = tuple((p.fit, p.origin, p.reason) for p in profiles)
        if state == self.record.told:
            return
        self.record.told = state
        for planned, profile in zip(self._encode_sites, profiles, strict=True):
            name = planned.cached.site.node.name
            if profile.reason:
                self.record.notes[name] = profile.reason
            else:
                self.record.notes.pop(name, None)
            updates = planned.cached.k, planned.cached.v
            for update, ref in zip(updates, profile.codes or (), strict=False):
                _check_shape(update.node, ref)
            self.record.layers[name] = profile
        origins = dict.fromkeys(p.origin.text for p in profiles if p.origin is not None)
        self.record.profile = "; ".join(origins)

    def _run(self, args: tuple[Any, ...], refs: list[CodeRef]) -> tuple[Any, ...]:
        """Run the compiled graph."""
        boundary = self.boundary
        args = boundary.make_room(args)
        by_kind = any(ref.layout.plane_kinds for ref in refs)
        tokens = self._prompt_kinds.sort(args, self.record) if by_kind else None
        try:
            artifact, interface, inputs = self._artifact(args, refs, tokens)
        except Exception as error:  # the model must run, whatever goes wrong here
            raise Unprepared(first_line(error)) from error
        token = CALLER.set(self._caller)
        try:
            results = artifact(inputs)
        finally:
            CALLER.reset(token)
        attended = len(self.plan.having("attend"))
        self.record.attends += attended
        self.record.ran("decode" if boundary.handles else "encode")
        return boundary.outputs(args, interface, list(results), refs, {}, tokens)

    def _give_up(self, error: Exception) -> None:
        reason = f"a graph could not be rewritten or compiled ({first_line(error)})"
        log.warning("attentionpack: %s; it runs uncompiled, its caches are dense", reason)
        log.debug("what failed", exc_info=True)
        self.record.reason = f"{reason}: please report it"
        self._given_up = True

    def _dense(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The Dynamo graph as it is, on dense caches."""
        self.record.ran("uncompiled")
        return tuple(on_dense(lambda dense: self.gm(*dense), args, self._written))

    @cached_property
    def _written(self) -> list[int]:
        return written_inputs(self.gm.graph, self.boundary.handles)

    def _artifact(
        self, args: tuple[Any, ...], refs: list[CodeRef], tokens: SortedTokens | None
    ) -> tuple[Specialised, Interface, list[Any]]:
        """What to call for these arguments, made now if need be, and its inputs."""
        boundary = self.boundary
        layouts, together = boundary.layouts(args), boundary.in_step(args)
        specs = tuple(ref.layout.spec for ref in refs)
        key = (layouts, specs, boundary.policies(args), together)
        lowered = self._lowered.get(key)
        if lowered is None:
            with COMPILING:
                lowered = self._lowered.get(key) or self._lower(layouts, refs, together)
                self._lowered[key] = lowered
        inputs = boundary.inputs(args, lowered.interface, refs, tokens)
        artifact = lowered.artifact_for(inputs)
        if artifact is None:
            with COMPILING:  # another thread may be doing so
                artifact = lowered.artifact_for(inputs) or self._compile(lowered, inputs)
        return artifact, lowered.interface, inputs

    def _lower(
        self, layouts: tuple[str, ...], refs: list[CodeRef], together: tuple[bool, bool]
    ) -> Lowered:
        draft = Draft(self.gm, self.plan, layouts, together)
        reports = [rewrite_attend(draft), rewrite_unpack(draft)]
        policies = self.boundary.policies_for(refs)
        reports.append(rewrite_encode(draft, tuple(r.layout.spec for r in refs), policies))
        self.record.passed(reports)
        return Lowered(*draft.finish(), layouts)

    def _compile(self, lowered: Lowered, inputs: list[Any]) -> Specialised:
        dynamic = [
            self._dynamics.of(slot, value, lowered.layouts)
            for slot, value in zip(lowered.interface.slots, inputs, strict=True)
        ]
        loose = [self._dynamics.loose(slot) for slot in lowered.interface.slots]
        lowered.floats.add(python_floats(lowered.gm, inputs))
        if len(lowered.floats) > MOST_FLOATS:
            raise RuntimeError(
                f"a float of the model has had {len(lowered.floats)} values, "
                f"each of which is compiled anew; at most {MOST_FLOATS} are"
            )
        gm = fx.GraphModule(lowered.gm, lowered.gm.graph)
        artifact = Specialised(gm, inputs, dynamic, self.compiler, loose)
        lowered.artifacts.append(artifact)
        self.record.compiles += 1
        return artifact


def _check_shape(node: fx.Node, ref: CodeRef) -> None:
    """Codes that were loaded may be those of another model.

    Raises:
        ProfileError: they are.
    """
    shape = shape_of(node)
    assert shape is not None
    if (ref.layout.heads, ref.layout.dim) != (shape[1], shape[3]):
        raise ProfileError(
            f"codes for {ref.layout.heads} heads of {ref.layout.dim} were loaded for a layer with "
            f"{shape[1]} heads of {shape[3]}"
        )
