"""What crosses the boundary of a rewritten graph: packed inputs taken apart, new handles made."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..cache import PackedKV, Policy, SideStore
from ..codec import CodeRef
from ..fitting.layer import Lesson
from ..kernels.kinds import SortedTokens
from ..options import Options
from ..passes.base import value_of
from ..passes.draft import (
    AppendedOutput,
    ArgumentOutput,
    DenseOutput,
    EncodedOutput,
    ExtendedOutput,
    Interface,
    PlainOutput,
)
from ..passes.plan import Plan, PlannedSite
from ..passes.rewrite_encode import devices_of, encoded_updates, prompt_sites
from .arguments import in_step, lengths_of
from .flush import Flush
from .owners import Owners

log = logging.getLogger(__name__)


class Boundary:
    """Between the arguments and results of a Dynamo graph and those of its rewritten forms.

    Args:
        gm: the Dynamo graph.
        plan: what is done with it.
        options: the user's.
        owners: whose records know the caches that are made.
        capture: whether work on rings may become a CUDA graph.

    Attributes:
        handles: positions of the packed inputs.
        appends: tokens that the graph writes into the ring of each.
        updates: cache tensors that the graph encodes.
    """

    def __init__(
        self, gm: fx.GraphModule, plan: Plan, options: Options, owners: Owners,
        capture: bool = True,
    ) -> None:  # fmt: skip
        arguments = [n for n in gm.graph.nodes if n.op == "placeholder"]
        sites = plan.having("encode")
        self.handles = [arguments.index(h) for h in plan.handles]
        self.appends = plan.appended
        self.updates = encoded_updates(sites)
        self._options = options
        self._owners = owners
        self._names = _names(sites)
        self._fixed = {u.node for s in sites if s.cached.crosses for u in (s.cached.k, s.cached.v)}
        self._prompts = {
            u.node for s in prompt_sites(sites) for u in (s.cached.k, s.cached.v)
        }  # fmt: skip
        self._flush = Flush(capture)

    def layouts(self, args: Sequence[Any]) -> tuple[str, ...]:
        """Specs of the packed inputs."""
        return tuple(args[i].store.ref.layout.spec for i in self.handles)

    def policies(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Which tokens of the packed inputs stay exact."""
        return tuple(args[i].store.policy for i in self.handles)

    def policies_for(self, refs: Sequence[CodeRef]) -> tuple[Policy, ...]:
        """Which tokens stay exact of each cache tensor that is encoded, by codes ``refs``."""
        own = self._options.policy
        return tuple(
            (own.fixed if update.node in self._fixed else own).for_code(ref)
            for update, ref in zip(self.updates, refs, strict=True)
        )

    def in_step(self, args: Sequence[Any]) -> tuple[bool, bool]:
        """Whether packed inputs that grow have the same lengths; whether the others have."""
        return in_step([args[i] for i in self.handles], self.appends)

    def make_room(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Handles whose stores have room in the ring for what the graph appends.

        Stores of one length are brought in step: coded up to the same token, capacities alike.
        """
        if not any(self.appends):
            return args
        ready = list(args)
        stores: list[SideStore] = []
        users = Counter(id(args[position].store) for position in self.handles)
        for position, tokens in zip(self.handles, self.appends, strict=True):
            handle = args[position]
            if tokens:
                # A store that another input reads as well must not be written under it.
                shared = users[id(handle.store)] > 1
                length = handle.shape[2]
                store = handle.store.clone(length) if shared else handle.store.branch(length)
                stores.append(store)
                if store is not handle.store:
                    ready[position] = PackedKV.of(store)
        self._flush(stores, [tokens for tokens in self.appends if tokens])
        coded: dict[int, int] = {}
        for store in stores:
            coded[store.length] = max(coded.get(store.length, 0), store.coded)
        for store in stores:
            if store.coded != coded[store.length]:
                store.align(coded[store.length], store.side.capacity)
        capacity = max(s.side.capacity for s in stores)
        for store in stores:
            if store.side.capacity != capacity:
                store.align(store.coded, capacity)
            store.free_ring()
        return tuple(ready)

    def inputs(
        self, args: Sequence[Any], interface: Interface, refs: Sequence[CodeRef],
        tokens: SortedTokens | None = None,
    ) -> list[Any]:  # fmt: skip
        """The inputs of a rewritten graph.

        Args:
            args: of the Dynamo graph.
            interface: of the rewritten one.
            refs: the codes that it encodes with.
            tokens: of the prompt, by kind, if any of these has a code for each.
        """
        handles = [args[i] for i in self.handles]
        kinds: list[Tensor] = []
        if tokens is not None:
            kinds += [t for place in devices_of(self.updates) for t in tokens.tensors(place)]
        tables: list[Sequence[Any]] = [args, lengths_of(handles, self.appends), kinds]
        for handle in handles:
            store = handle.store
            more = [] if store.importance is None else [store.importance]
            tables.append((*store.tensors(), *store.ref.code.on(store.device), *more))
        for update, ref in zip(self.updates, refs, strict=False):
            tables.append(ref.code.on(value_of(update.node).device))
        return [tables[table][index] for table, index in interface.slots]

    def outputs(
        self, args: Sequence[Any], interface: Interface, results: list[Any],
        refs: Sequence[CodeRef], lessons: Mapping[fx.Node, Lesson],
        tokens: SortedTokens | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """The results of the Dynamo graph.

        Args:
            args: its arguments.
            interface: of the rewritten graph.
            results: of that; dense ones are let go of as they are packed.
            refs: codes of what it encoded, or is packed here.
            lessons: what the prefill tells of the cache tensors that are packed here.
            tokens: see :meth:`inputs`.
        """
        for number, value in interface.written:
            args[self.handles[number]].replace(results[value])
        made: dict[Any, Any] = {}
        outputs = []
        for recipe in interface.outputs:
            if isinstance(recipe, PlainOutput):
                outputs.append(results[recipe.value])
                continue
            if recipe not in made:
                made[recipe] = self._handle(args, results, refs, lessons, tokens, recipe)
            outputs.append(made[recipe])
        return tuple(outputs)

    def _handle(
        self, args: Sequence[Any], results: list[Any], refs: Sequence[CodeRef],
        lessons: Mapping[fx.Node, Lesson], tokens: SortedTokens | None, recipe: Any,
    ) -> Tensor:  # fmt: skip
        if isinstance(recipe, ArgumentOutput):
            return args[recipe.argument]
        if isinstance(recipe, AppendedOutput):
            store = args[self.handles[recipe.handle]].store
            store.advance(self.appends[recipe.handle])
            return PackedKV.of(store)
        if isinstance(recipe, ExtendedOutput):
            known = None if recipe.importance is None else results[recipe.importance]
            return args[self.handles[recipe.handle]].append(results[recipe.value], known)
        ref, policy = refs[recipe.code], self.policies_for(refs)[recipe.code]
        if isinstance(recipe, EncodedOutput):
            tensors = results[recipe.value : recipe.value + recipe.count]
            length = int(results[recipe.value + recipe.count])
            sorted_ = ref.layout.plane_kinds and self.updates[recipe.code].node in self._prompts
            kinds = tokens.counts if tokens is not None and sorted_ else None
            store = SideStore.from_encoded(tensors, ref, policy, length, kinds)
        else:
            assert isinstance(recipe, DenseOutput)
            dense, results[recipe.value] = results[recipe.value], None
            try:
                lesson = lessons[self.updates[recipe.code].node]
                store = SideStore.encode(
                    dense, ref, policy, lesson.visible, lesson.importance, lesson.mask
                )
            except torch.OutOfMemoryError:
                log.warning("attentionpack: memory ran out while a cache was packed: left dense")
                return dense
        store.name = self._names[self.updates[recipe.code].node]
        store.known_to(self._owners.record.stores)
        return PackedKV.of(store)


def _names(sites: Sequence[PlannedSite]) -> dict[fx.Node, str]:
    """Names of cache tensors for the report, after the first site that reads them."""
    names: dict[fx.Node, str] = {}
    for site in (s.cached for s in sites):
        names.setdefault(site.k.node, f"{site.site.node.name}.k")
        names.setdefault(site.v.node, f"{site.site.node.name}.v")
    return names
