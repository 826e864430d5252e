"""The callable that Dynamo's bytecode calls for a graph with packed caches.

Each call takes the packed inputs apart, runs the rewritten graph on plain tensors, and makes new
handles of what comes out. Rewritten graphs are made when they are first needed, one for each
combination of codes: a prefill whose layers have no codes yet, in memory or on disk, runs once,
uncompiled, to learn them (``fit``); from then on the compiled graph encodes (``encode``); a graph
with packed inputs attends to them (``decode``).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..cache import PackedKV, SideStore
from ..codec import CodeRef
from ..codec.fixed import FIXED, fixed_ref
from ..codec.sensitivity import Sensitivity
from ..compat import compile_inner
from ..fitting.file import ProfileError
from ..fitting.keep import Identity, identify, recall, remember
from ..fitting.layer import LEARNING, PROFILES, LayerProfile, Profiles
from ..fitting.learn import learn
from ..fitting.progress import Progress
from ..ops.region import INDUCTOR_CONFIG
from ..options import Options
from ..passes.base import shape_of, value_of
from ..passes.draft import (
    AppendedOutput,
    ArgumentOutput,
    DenseOutput,
    Draft,
    EncodedOutput,
    ExtendedOutput,
    Interface,
    PlainOutput,
)
from ..passes.plan import Plan
from ..passes.rewrite_attend import appended_tokens, rewrite_attend
from ..passes.rewrite_encode import encoded_updates, rewrite_encode
from ..passes.rewrite_unpack import rewrite_unpack
from .arguments import Dynamics, in_step, lengths_of
from .paper import paper_code, paper_sites
from .specialise import Specialised
from .stats import GraphRecord
from .study import Studies, Study

log = logging.getLogger(__name__)


class Lowered:
    """One rewriting of the graph and its Inductor artifacts, one for each set of shapes."""

    def __init__(self, gm: fx.GraphModule, interface: Interface, layouts: tuple[str, ...]) -> None:
        self.gm = gm
        self.interface = interface
        self.layouts = layouts
        self.artifacts: list[Specialised] = []


class PackedGraph:
    """A Dynamo graph with packed caches.

    Args:
        gm: the graph.
        plan: what to do with it.
        options: the user's.
        config: Inductor settings.
        record: where to count.
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
        self.record = record
        self._dynamics = Dynamics(gm.graph, plan.handles)
        self.studies = Studies(gm, plan, options, partial(self._inputs, refs=[]))
        self._lowered: dict[Any, Lowered] = {}
        arguments = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self._handles = [arguments.index(h) for h in plan.handles]
        self._positions = {n: i for i, n in enumerate(arguments)}
        self._encode_sites = plan.having("encode")
        self._updates = encoded_updates(self._encode_sites)
        self._names: dict[fx.Node, str] = {}
        for site in (s.cached for s in self._encode_sites):
            self._names.setdefault(site.k.node, f"{site.site.node.name}.k")
            self._names.setdefault(site.v.node, f"{site.site.node.name}.v")
        self._appends = appended_tokens(plan)
        self._told: tuple[Any, ...] = ()

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """The results of the Dynamo graph, caches packed."""
        if not self.record.runs:
            self.record.belongs_to((*args, *self.gm.parameters()))
        return self.studies.prompts.run(self._call, args)

    def _call(self, *args: Any) -> tuple[Any, ...]:
        if self.options.codec == "svd" and self._encode_sites:
            return self._factor(args)
        profiles = self.profiles(args, PROFILES)
        if not self._served(profiles, args):
            with LEARNING:  # another thread may be fitting the same layers
                if not self._served(profiles, args):
                    identity = self.identity(args)
                    recall(profiles, identity, self.options, self.studies.length(args))
                    if not self._served(profiles, args):
                        return self._fit(args, profiles, identity)
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

    def identity(self, args: Sequence[Any]) -> Identity | str:
        """By what the layers are known in other processes, or why they are not."""
        sites = [s.cached for s in self._encode_sites]
        return identify(self.gm.graph, sites, partial(self._value, args=args))

    def _value(self, node: fx.Node, args: Sequence[Any]) -> Any:
        """What an input or attribute of the Dynamo graph is."""
        if node.op == "placeholder":
            return args[self._positions[node]]
        return _get_attr(self.gm, str(node.target))

    def _served(self, profiles: Sequence[LayerProfile], args: tuple[Any, ...]) -> bool:
        visual = self._meets_blind_codes(profiles, args)
        return not profiles or all(p.serves(self.studies.length(args), visual) for p in profiles)

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
        for update in self._updates:
            shape = shape_of(update.node)
            assert shape is not None
            refs.append(fitted.get(update.node) or fixed_ref(codec, shape[1], shape[3]))
        return refs

    # Running -------------------------------------------------------------------------------------

    def _fit(
        self, args: tuple[Any, ...], profiles: Sequence[LayerProfile], identity: Identity | str
    ) -> tuple[Any, ...]:
        """Run once without Inductor, gather moments, fit, and pack what came out."""
        with Progress("learning codes from this prompt") as progress:
            progress.step("prefill")
            study = self.studies.run(args, self._layouts(args))

            def sense() -> list[Sensitivity] | str:
                progress.step("measuring sensitivity")
                measured = self.studies.sense(args, study)
                progress.step("fitting")
                return measured if isinstance(measured, str) else measured.mixed

            with torch.inference_mode(False), torch.no_grad():  # codes outlive the call
                if learn(profiles, study.lessons, self.options, sense):
                    remember(profiles, identity, self.options)
        self._tell(profiles)
        self.record.ran("fit")
        return self.pack(args, study, self._refs(profiles))

    def pack(self, args: tuple[Any, ...], study: Study, refs: Sequence[CodeRef]) -> tuple[Any, ...]:
        """The results of the Dynamo graph, made of those of an uncompiled prefill."""
        visible: dict[fx.Node, Any] = {}
        for planned, tokens in zip(self._encode_sites, study.visible, strict=True):
            visible.setdefault(planned.cached.k.node, tokens)
            visible.setdefault(planned.cached.v.node, tokens)
        return self._outputs(args, study.interface, study.results, refs, visible)

    def _factor(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Run without Inductor, and give every sequence a basis of its own."""
        study = self.studies.run(args, self._layouts(args))
        dense = {
            recipe.code: study.results[recipe.value]
            for recipe in study.interface.outputs if isinstance(recipe, DenseOutput)
        }  # fmt: skip
        sites = paper_sites(self._encode_sites, study.turns, study.visible)
        refs = [
            paper_code(dense[number], sites[update.node], self.options)
            for number, update in enumerate(self._updates)
        ]
        self.record.ran("factor")
        return self.pack(args, study, refs)

    def _tell(self, profiles: Sequence[LayerProfile]) -> None:
        """Tell the report what is new of the layers."""
        state = tuple((p.fit, p.origin, p.reason) for p in profiles)
        if state == self._told:
            return
        self._told = state
        for planned, profile in zip(self._encode_sites, profiles, strict=True):
            name = planned.cached.site.node.name
            if profile.reason:
                self.record.notes[name] = profile.reason
            else:
                self.record.notes.pop(name, None)
            updates = planned.cached.k, planned.cached.v
            for side, update, ref in zip("kv", updates, profile.codes or (), strict=False):
                _check_shape(update.node, ref)
                self.record.errors[f"{name}.{side}"] = ref.code.error
                if ref.code.kinds is not None:
                    self.record.kinds[f"{name}.{side}"] = ref.code.kinds
        origins = dict.fromkeys(p.origin.text for p in profiles if p.origin is not None)
        self.record.profile = "; ".join(origins)

    def _run(self, args: tuple[Any, ...], refs: list[CodeRef]) -> tuple[Any, ...]:
        """Run the compiled graph."""
        args = self._make_room(args)
        handles = [args[i] for i in self._handles]
        layouts, together = self._layouts(args), in_step(handles, self._appends)
        specs = tuple(ref.layout.spec for ref in refs)
        key = (layouts, specs, tuple(h.store.policy for h in handles), together)
        lowered = self._lowered.get(key)
        if lowered is None:
            lowered = self._lowered[key] = self._lower(layouts, refs, together)
        interface = lowered.interface
        inputs = self._inputs(args, interface, refs)
        for artifact in lowered.artifacts:
            if artifact.accepts(inputs):
                break
        else:
            artifact = self._compile(lowered, inputs)
        token = INDUCTOR_CONFIG.set(self.config)
        try:
            results = artifact(inputs)
        finally:
            INDUCTOR_CONFIG.reset(token)
        attended = len(self.plan.having("attend"))
        self.record.attends += attended
        self.record.ran("decode" if self._handles else "encode")
        return self._outputs(args, interface, list(results), refs, {})

    def _lower(self, layouts: tuple[str, ...], refs: list[CodeRef], together: bool) -> Lowered:
        draft = Draft(self.gm, self.plan, layouts, together)
        reports = [rewrite_attend(draft), rewrite_unpack(draft)]
        policies = tuple(self.options.policy.for_code(ref) for ref in refs)
        reports.append(rewrite_encode(draft, tuple(r.layout.spec for r in refs), policies))
        self.record.reports += tuple(reports)
        return Lowered(*draft.finish(), layouts)

    def _compile(self, lowered: Lowered, inputs: list[Any]) -> Specialised:
        dynamic = [
            self._dynamics.of(slot, value, lowered.layouts)
            for slot, value in zip(lowered.interface.slots, inputs, strict=True)
        ]
        gm = fx.GraphModule(lowered.gm, lowered.gm.graph)
        artifact = Specialised(gm, inputs, dynamic, self.compiler)
        lowered.artifacts.append(artifact)
        self.record.compiles += 1
        return artifact

    # In and out ----------------------------------------------------------------------------------

    def _layouts(self, args: tuple[Any, ...]) -> tuple[str, ...]:
        return tuple(args[i].store.ref.layout.spec for i in self._handles)

    def _make_room(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Handles whose stores have room in the ring for what the graph appends.

        Stores of one length are brought in step: coded up to the same token, capacities alike.
        """
        if not any(self._appends):
            return args
        ready = list(args)
        stores: list[SideStore] = []
        users = Counter(id(args[position].store) for position in self._handles)
        for position, tokens in zip(self._handles, self._appends, strict=True):
            handle = args[position]
            if tokens:
                # A store that another input reads as well must not be written under it.
                shared = users[id(handle.store)] > 1
                length = handle.shape[2]
                store = handle.store.clone(length) if shared else handle.store.branch(length)
                store.reserve(tokens)
                stores.append(store)
                if store is not handle.store:
                    ready[position] = PackedKV.of(store)
        capacity = max(s.side.capacity for s in stores)
        coded: dict[int, int] = {}
        for store in stores:
            coded[store.length] = max(coded.get(store.length, 0), store.coded)
        for store in stores:
            if store.coded != coded[store.length] or store.side.capacity != capacity:
                store.align(coded[store.length], capacity)
        return tuple(ready)

    def _inputs(
        self, args: tuple[Any, ...], interface: Interface, refs: Sequence[CodeRef]
    ) -> list[Any]:
        handles = [args[i] for i in self._handles]
        tables: list[Sequence[Any]] = [args, lengths_of(handles, self._appends)]
        for handle in handles:
            store = handle.store
            tables.append((*store.tensors(), *store.ref.code.on(store.device)))
        for update, ref in zip(self._updates, refs, strict=False):
            tables.append(ref.code.on(value_of(update.node).device))
        return [tables[table][index] for table, index in interface.slots]

    def _outputs(
        self, args: tuple[Any, ...], interface: Interface, results: list[Any],
        refs: Sequence[CodeRef], visible: dict[fx.Node, Any],
    ) -> tuple[Any, ...]:  # fmt: skip
        for number, value in interface.written:
            args[self._handles[number]].replace(results[value])
        made: dict[Any, Any] = {}
        outputs = []
        for recipe in interface.outputs:
            if isinstance(recipe, PlainOutput):
                outputs.append(results[recipe.value])
                continue
            if recipe not in made:
                made[recipe] = self._handle(args, interface, results, refs, visible, recipe)
            outputs.append(made[recipe])
        return tuple(outputs)

    def _handle(
        self, args: tuple[Any, ...], interface: Interface, results: list[Any],
        refs: Sequence[CodeRef], visible: dict[fx.Node, Any], recipe: Any,
    ) -> PackedKV:  # fmt: skip
        policy = self.options.policy
        if isinstance(recipe, ArgumentOutput):
            return args[recipe.argument]
        if isinstance(recipe, AppendedOutput):
            store = args[self._handles[recipe.handle]].store
            store.advance(self._appends[recipe.handle])
            return PackedKV.of(store)
        if isinstance(recipe, ExtendedOutput):
            return args[self._handles[recipe.handle]].append(results[recipe.value])
        ref = refs[recipe.code]
        if isinstance(recipe, EncodedOutput):
            tensors = results[recipe.value : recipe.value + recipe.count]
            length = int(results[recipe.value + recipe.count])
            store = SideStore.from_encoded(tensors, ref, policy.for_code(ref), length)
        else:
            assert isinstance(recipe, DenseOutput)
            dense, results[recipe.value] = results[recipe.value], None
            store = SideStore.encode(
                dense, ref, policy, visible.get(self._updates[recipe.code].node)
            )
        store.name = self._names[self._updates[recipe.code].node]
        self.record.stores.add(store)
        return PackedKV.of(store)


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


def _get_attr(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    return value
