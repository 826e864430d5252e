"""The callable that Dynamo's bytecode calls for a graph with packed caches.

Each call takes the packed inputs apart, runs the rewritten graph on plain tensors, and makes new
handles of what comes out. Rewritten graphs are made when they are first needed, one for each
combination of codes: a prefill whose layers have no codes yet runs once, uncompiled, to learn
them (``fit``); from then on the compiled graph encodes (``encode``); a graph with packed inputs
attends to them (``decode``).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from ..cache import PackedKV, SideStore
from ..codec import CodeRef
from ..codec.rotation import Turn
from ..codec.sensitivity import Sensitivity
from ..compat import compile_inner
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
from ..passes.rewrite_encode import TOLD, collect, encoded_updates, rewrite_encode
from ..passes.rewrite_unpack import rewrite_unpack
from ..profile import PROFILES, LayerProfile, Lesson, learn
from .arguments import Dynamics, Sizes, in_step, lengths_of
from .sense import Unmeasured, measure
from .specialise import Specialised
from .stats import GraphRecord

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
        self._sizes = Sizes(gm.graph)
        self._lowered: dict[Any, Lowered] = {}
        arguments = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self._handles = [arguments.index(h) for h in plan.handles]
        self._positions = {n: i for i, n in enumerate(arguments)}
        self._encode_sites = plan.having("encode")
        self._updates = encoded_updates(self._encode_sites)
        self._appends = appended_tokens(plan)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """The results of the Dynamo graph, caches packed."""
        if not self.record.runs:
            self.record.belongs_to((*args, *self.gm.parameters()))
        profiles = self._profiles(args)
        if profiles and not all(p.serves(self._length(args)) for p in profiles):
            return self._fit(args, profiles)
        return self._run(args, self._refs(profiles))

    # Layers --------------------------------------------------------------------------------------

    def _profiles(self, args: tuple[Any, ...]) -> list[LayerProfile]:
        """The profile of each ``encode`` site."""
        if self.options.codec == "exact":
            return []
        found = []
        for index, planned in enumerate(self._encode_sites):
            node = planned.cached.k.weight
            weight = None
            if node is not None:
                weight = (args[self._positions[node]] if node.op == "placeholder"
                          else _get_attr(self.gm, str(node.target)))  # fmt: skip
            found.append(PROFILES.layer(weight, self, index, self.options))
        return found

    def _dims(self) -> list[tuple[int, int]]:
        return [
            (shape_of(s.cached.k.node)[3], shape_of(s.cached.v.node)[3])  # type: ignore[index]
            for s in self._encode_sites
        ]

    def _refs(self, profiles: Sequence[LayerProfile]) -> list[CodeRef]:
        """The code of each update that is encoded; exact ones where there is no fit."""
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
            refs.append(fitted.get(update.node) or _exact(shape[1], shape[3]))
        return refs

    # Running -------------------------------------------------------------------------------------

    def _fit(self, args: tuple[Any, ...], profiles: Sequence[LayerProfile]) -> tuple[Any, ...]:
        """Run once without Inductor, gather moments, fit, and pack what came out."""
        draft = Draft(self.gm, self.plan, self._layouts(args))
        rewrite_unpack(draft)
        collect(draft, self.options.sinks)
        gm, interface = draft.finish()
        inputs = self._inputs(args, interface, [])
        with torch.no_grad():
            results = gm(*inputs)
        count = len(self._encode_sites)
        length = self._length(args)
        told = results[interface.extra : interface.extra + TOLD * count]
        sums, seen = told[::TOLD], told[1::TOLD]
        turns = [
            Turn.of(cos, sin, interleaved, length)
            for cos, sin, interleaved in zip(
                told[2::TOLD], told[3::TOLD], told[4::TOLD], strict=True
            )
        ]
        lessons = [
            Lesson(s, turn, visible, dims, length)
            for s, turn, visible, dims in zip(sums, turns, seen, self._dims(), strict=True)
        ]
        learn(profiles, lessons, self.options, partial(self._sense, args, turns, seen))
        for index, profile in enumerate(profiles):
            self._note(index, profile)
        refs = self._refs(profiles)
        visible: dict[fx.Node, Any] = {}
        for planned, tokens in zip(self._encode_sites, seen, strict=True):
            visible.setdefault(planned.cached.k.node, tokens)
            visible.setdefault(planned.cached.v.node, tokens)
        self.record.ran("fit")
        return self._outputs(args, interface, list(results), refs, visible)

    def _sense(
        self, args: tuple[Any, ...], turns: Sequence[Turn | None], seen: Sequence[Any]
    ) -> list[Sensitivity] | str:
        """The sensitivity of each ``encode`` site, or why it is not known."""
        if self._handles:
            return "some caches are packed already"
        k = self._encode_sites[0].cached.k
        if k.past is not None:
            return "not a prefill"
        batch = self._sizes.value(value_of(k.node).shape[0], args)
        device = value_of(k.node).device
        coded = seen[0]
        if coded is None:
            coded = torch.ones(batch, self._length(args), dtype=torch.bool, device=device)
        coded = coded & (coded.cumsum(1) > self.options.sinks)
        try:
            return measure(self.gm, args, self._encode_sites, turns, coded, self.options.window)
        except Unmeasured as error:
            return str(error).partition("\n")[0]  # what follows names a node of the graph

    def _length(self, args: tuple[Any, ...]) -> int:
        """Tokens of the cache that the first ``encode`` site makes."""
        return self._sizes.value(value_of(self._encode_sites[0].cached.k.node).shape[2], args)

    def _note(self, index: int, profile: LayerProfile) -> None:
        name = self._encode_sites[index].cached.site.node.name
        if profile.reason:
            self.record.notes[name] = profile.reason
        else:
            self.record.notes.pop(name, None)
        if profile.codes is not None:
            for side, ref in zip("kv", profile.codes, strict=True):
                self.record.errors[f"{name}.{side}"] = ref.code.error

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
        self.record.stores.add(store)
        return PackedKV.of(store)


def _get_attr(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    return value


_EXACT: dict[tuple[int, int], CodeRef] = {}


def _exact(heads: int, dim: int) -> CodeRef:
    from ..cache.store import exact_ref

    if (heads, dim) not in _EXACT:
        _EXACT[heads, dim] = exact_ref(heads, dim)
    return _EXACT[heads, dim]
