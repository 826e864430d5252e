"""Dynamo graphs of small functions, and running their rewritings without Inductor."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from apack_compile.cache import PackedKV, Policy, SideStore
from apack_compile.codec import CodeRef
from apack_compile.codec.fixed import fixed_ref
from apack_compile.kernels.kinds import SortedTokens
from apack_compile.passes.base import PassReport
from apack_compile.passes.draft import (
    AppendedOutput,
    ArgumentOutput,
    DenseOutput,
    Draft,
    EncodedOutput,
    ExtendedOutput,
    Interface,
    PlainOutput,
)
from apack_compile.passes.plan import Plan, make_plan
from apack_compile.passes.rewrite_attend import rewrite_attend
from apack_compile.passes.rewrite_encode import encoded_updates, rewrite_encode
from apack_compile.passes.rewrite_unpack import rewrite_unpack
from apack_compile.runtime.arguments import lengths_of

# float32 sums in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

POLICY = Policy(sinks=2, extra=2, window=8, block=32, chunk=16)


@dataclass
class Captured:
    """One Dynamo graph, its plan, and the arguments of its first call."""

    gm: fx.GraphModule
    plan: Plan
    args: tuple[Any, ...]

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    @property
    def treatments(self) -> list[str]:
        return [site.treatment for site in self.plan.sites]

    @property
    def reasons(self) -> list[str]:
        return [skip.reason for skip in self.plan.skipped]

    @property
    def stores(self) -> list[SideStore]:
        return [a.store for a in self.args if isinstance(a, PackedKV)]

    def draft(self, in_step: bool = False) -> Draft:
        specs = tuple(s.ref.layout.spec for s in self.stores)
        return Draft(self.gm, self.plan, specs, (in_step, in_step))

    def expected(self) -> tuple[Any, ...]:
        """What the Dynamo graph returns for dense tensors."""
        dense = [a.unpack() if isinstance(a, PackedKV) else a for a in self.args]
        return self.gm(*dense)


def capture(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> Captured:
    """The one graph of ``fn(*args)``."""
    found: list[Captured] = []

    def record(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        captured = Captured(gm, make_plan(gm.graph), ())
        found.append(captured)

        def call(*args: Any) -> Any:
            captured.args = args
            dense = [a.unpack() if isinstance(a, PackedKV) else a for a in args]
            return gm(*dense)

        return call

    torch.compile(fn, backend=record, fullgraph=True, dynamic=dynamic)(*args)
    assert len(found) == 1
    return found[0]


@dataclass
class Rewritten:
    """A rewritten graph and how to call it."""

    gm: fx.GraphModule
    interface: Interface
    reports: list[PassReport]
    refs: list[CodeRef]

    @property
    def calls(self) -> Counter[str]:
        return calls(self.gm.graph)


def rewrite(
    captured: Captured, refs: Sequence[CodeRef] | None = None, in_step: bool = False
) -> Rewritten:
    """All rewriting passes; exact codes unless ``refs`` are given."""
    draft = captured.draft(in_step)
    updates = encoded_updates(captured.plan.having("encode"))
    shapes = [update.node.meta["example_value"].shape for update in updates]
    codes = list(refs or [fixed_ref("exact", shape[1], shape[3]) for shape in shapes])
    specs = tuple(ref.layout.spec for ref in codes)
    policies = tuple(POLICY.for_code(ref) for ref in codes)
    reports = [rewrite_attend(draft), rewrite_unpack(draft), rewrite_encode(draft, specs, policies)]
    gm, interface = draft.finish()
    return Rewritten(gm, interface, reports, codes)


def table_of(store: SideStore) -> list[Tensor]:
    """What graphs read of a packed input."""
    more = [] if store.importance is None else [store.importance]
    return [*store.tensors(), *store.ref.code.params, *more]


def run(
    captured: Captured, new: Rewritten, prompt: SortedTokens | None = None
) -> tuple[list[Any], list[Any]]:
    """Results of the Dynamo graph by its rewriting, handles unpacked; then the extra ones.

    Stores need room in their rings for what the graph appends. ``prompt``: its tokens by kind.
    """
    gm, interface, refs = new.gm, new.interface, new.refs
    handles = [captured.args[i] for i in interface.handles]
    kinds = () if prompt is None else prompt.tensors(torch.device("cpu"))
    tables = [captured.args, lengths_of(handles, interface.appends), kinds]
    tables += [table_of(h.store) for h in handles]
    tables += [ref.code.params for ref in refs]
    results = gm(*(tables[table][index] for table, index in interface.slots))
    for handle, tokens in zip(handles, interface.appends, strict=True):
        handle.store.advance(tokens)

    def value(out: Any) -> Any:
        if isinstance(out, PlainOutput | DenseOutput):
            return results[out.value]
        if isinstance(out, ArgumentOutput):
            return captured.args[out.argument].unpack()
        if isinstance(out, AppendedOutput):
            return handles[out.handle].store.dense(handles[out.handle].store.length)
        if isinstance(out, ExtendedOutput):
            known = None if out.importance is None else results[out.importance]
            return handles[out.handle].append(results[out.value], known).unpack()
        assert isinstance(out, EncodedOutput)
        tensors = list(results[out.value : out.value + out.count])
        length = results[out.value + out.count]
        ref = refs[out.code]
        counts = None if prompt is None else prompt.counts
        store = SideStore.from_encoded(tensors, ref, POLICY.for_code(ref), length, counts)
        return store.dense(length)

    return [value(out) for out in interface.outputs], list(results[interface.extra :])


def calls(graph: fx.Graph) -> Counter[str]:
    """How often each operator, function or method is called."""

    def name(target: Any) -> str:
        if isinstance(target, torch._ops.OpOverload):
            return target.name()
        return target if isinstance(target, str) else target.__name__

    return Counter(name(n.target) for n in graph.nodes if n.op.startswith("call"))


def tokens(count: int, heads: int = 2, batch: int = 2, dim: int = 8) -> Tensor:
    return torch.randn(batch, heads, count, dim)


def packed(count: int, heads: int = 2, batch: int = 2, dim: int = 8) -> PackedKV:
    return PackedKV.pack(tokens(count, heads, batch, dim), policy=POLICY)


def check(captured: Captured, kinds: list[type], in_step: bool = False) -> Rewritten:
    """The rewritten graph gives what the Dynamo graph gives; its results are of these kinds."""
    expected = captured.expected()
    new = rewrite(captured, in_step=in_step)
    assert [type(out) for out in new.interface.outputs] == kinds
    results, extra = run(captured, new)
    assert extra == []
    for kind, mine, theirs in zip(kinds, results, expected, strict=True):
        if kind is PlainOutput:
            torch.testing.assert_close(mine, theirs, **CLOSE)
        else:
            assert torch.equal(mine, theirs)
    added = {n.target for n in new.gm.graph.nodes if n.op == "call_function"}
    added -= {n.target for n in captured.graph.nodes}
    added.discard(operator.getitem)
    assert all(isinstance(target, torch._ops.OpOverload) for target in added)
    return new


def ours(new: Rewritten) -> dict[str, int]:
    return {name: n for name, n in new.calls.items() if "apack" in name}


def grown(past_k: Tensor, past_v: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([past_k, k], -2), torch.cat([past_v, v], -2)


def repeat_kv(x: Tensor, groups: int = 2) -> Tensor:
    """As transformers has it."""
    batch, heads, length, dim = x.shape
    wide = x[:, :, None, :, :].expand(batch, heads, groups, length, dim)
    return wide.reshape(batch, heads * groups, length, dim)
