"""``apack_compile.report(model)``: what was packed, what was left alone and why, what it cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .accounting import CodedPart, KindPart, coded_part, coded_tokens, kind_parts, real_tokens
from .cache import SideStore
from .codec.code import Code, total_bytes
from .codec.tiered import TIERS
from .cost.live import predicted_bytes, predicted_step
from .fitting.layer import LayerProfile
from .passes.base import PassReport, Skip
from .runtime.stats import REGISTRY, GraphRecord


@dataclass(frozen=True)
class GraphReport:
    """One graph that Dynamo handed to the backend.

    Attributes:
        packed: attention sites whose cache is packed here.
        skipped: sites left alone, and why.
        reason: why the whole graph runs as stock Inductor runs it; empty if it does not.
        runs: how often it ran, by what was run: ``stock``, ``fit`` (once, uncompiled, to learn
            the codes), ``encode`` (prefill), ``decode``.
        compiles: Inductor compilations of the graph.
        regions: those of packed attention and encoding, which graphs share.
        passes: what each pass matched, and what it left alone.
        notes: of single sites, such as why a layer has no fitted code yet.
        profile: where the codes come from: fitted here or loaded, and on how many tokens.
    """

    packed: tuple[str, ...]
    skipped: tuple[Skip, ...]
    reason: str
    runs: tuple[tuple[str, int], ...]
    compiles: int
    notes: tuple[tuple[str, str], ...]
    profile: str = ""
    regions: int = 0
    passes: tuple[PassReport, ...] = ()


@dataclass(frozen=True)
class Report:
    """What the backend did for a model.

    Attributes:
        graph_reports: one for each graph.
        attends: packed attention calls.
        dense_bytes, packed_bytes: of the caches that this model packed and that are alive.
        coded: the part of these caches that the option ``ratio`` is about; None: nothing is coded.
        basis_bytes: of the codes' parameters, which belong to the model.
        errors: relative squared coding error of each site's keys and values, as predicted from
            the tokens the codes were fitted on.
        measured: of each layer's keys and values in the caches that are alive, by its first site,
            the relative squared error of the coded tokens, and the error over the predicted one
            (drift: 1 is as predicted).
        kinds: the same on text and on visual tokens alone, where both were seen.
        tiers: of the tokens that are coded in tiers in the caches that are alive, the share that
            lacks 0, 1, 2, ... bits.
        dropped: share of the coded tokens that are dropped, in the caches that are alive that drop
            any.
        by_kind: text and visual tokens in the caches that are alive that have a code for each;
            empty: there are none.
        predicted_bytes: what the cost model says of ``packed_bytes`` (docs/cost-model.md).
        predicted_step: seconds of packed attention in one step that reads all caches that are
            alive, as the cost model says; None: it does not know the device or the kernels.
    """

    graph_reports: tuple[GraphReport, ...]
    attends: int
    dense_bytes: int
    packed_bytes: int
    basis_bytes: int
    errors: tuple[tuple[str, float], ...]
    kinds: tuple[tuple[str, tuple[float, float]], ...] = ()
    measured: tuple[tuple[str, tuple[float, float]], ...] = ()
    tiers: tuple[float, ...] = ()
    coded: CodedPart | None = None
    dropped: float = 0.0
    by_kind: tuple[KindPart, ...] = ()
    predicted_bytes: int = 0
    predicted_step: float | None = None

    @property
    def graphs(self) -> int:
        """Graphs that Dynamo handed to the backend, for each model or layer that runs them."""
        return len(self.graph_reports)

    @property
    def packed_graphs(self) -> int:
        """Graphs with packed caches."""
        return sum(not g.reason for g in self.graph_reports)

    @property
    def recompiles(self) -> int:
        """Inductor compilations of packed graphs beyond the first of each."""
        return sum(max(g.compiles - 1, 0) for g in self.graph_reports if not g.reason)

    @property
    def sites(self) -> int:
        """The most attention sites packed in one graph, or layers fitted in several."""
        most = max((len(g.packed) for g in self.graph_reports), default=0)
        return max(most, len(self.errors) // 2)

    def __str__(self) -> str:
        lines = [
            f"attentionpack: {self.sites} attention sites packed; {self.graphs} graphs, "
            f"{self.packed_graphs} of them with packed caches, {self.recompiles} recompiles; "
            f"{self.attends} packed attention calls"
        ]
        if self.packed_bytes:
            lines.append(
                f"  caches alive: {self.dense_bytes / 1e6:.2f} MB dense, "
                f"{self.packed_bytes / 1e6:.2f} MB packed "
                f"({self.dense_bytes / self.packed_bytes:.2f}x); bases, per model: "
                f"{self.basis_bytes / 1e6:.2f} MB"
            )
            lines.append(
                f"  cost model: {self.predicted_bytes / 1e6:.2f} MB predicted, "
                f"{self.packed_bytes / 1e6:.2f} MB held" + _step(self.predicted_step)
            )
        if self.coded is not None:
            lines.append(f"  their coded part: {self.coded}")
        if self.by_kind:
            text, visual = self.by_kind
            lines.append(
                f"  by kind, in the mean over sides of layers: {visual.tokens:.1f} visual tokens "
                f"coded at {visual.ratio:.2f}x, {text.tokens:.1f} of text at {text.ratio:.2f}x"
            )
        for side, title in (("k", "keys"), ("v", "values")):
            errors = [e for name, e in self.errors if name.endswith(f".{side}")]
            if errors:
                mean = sum(errors) / len(errors)
                lines.append(
                    f"  coding error of {title} predicted, relative, by layer: mean {mean:.4f}, "
                    f"largest {max(errors):.4f}"
                )
            measured = [pair for name, pair in self.measured if name.endswith(f".{side}")]
            if measured:
                found, drifts = zip(*measured, strict=True)
                lines.append(
                    f"  coding error of {title} measured: mean {sum(found) / len(found):.4f}, "
                    f"largest {max(found):.4f}; over the predicted error: mean "
                    f"{sum(drifts) / len(drifts):.2f}, largest {max(drifts):.2f}"
                    + _drift_hint(max(drifts))
                )
            kinds = [pair for name, pair in self.kinds if name.endswith(f".{side}")]
            if kinds:
                text, visual = (sum(column) / len(kinds) for column in zip(*kinds, strict=True))
                lines.append(
                    f"  coding error of {title} by kind of token, mean: text {text:.4f}, "
                    f"visual {visual:.4f}"
                )
        if self.dropped:
            lines.append(
                f"  evicted: {self.dropped:.0%} of the coded tokens, keys and values are dropped"
            )
        if self.tiers:
            shares = [f"{share:.0%} lack {bits}" for bits, share in enumerate(self.tiers) if bits]
            lines.append(
                f"  values in tiers: {self.tiers[0]:.0%} of the coded tokens have all bits, "
                + ", ".join(shares)
            )
        for number, graph in enumerate(self.graph_reports):
            lines.extend(_graph_lines(number, graph))
        return "\n".join(lines)


def _step(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"; packed attention of all of them, one step: {1e3 * seconds:.3f} ms predicted"


DRIFT = 4.0
"""Times the predicted error from which the report advises to fit anew."""


def _drift_hint(drift: float) -> str:
    if drift < DRIFT:
        return ""
    return " (the codes were fitted on other content: apack_compile.fit on samples like this)"


def _measured(records: Iterable[GraphRecord]) -> list[tuple[str, tuple[float, float]]]:
    """Relative error and drift of coded tokens, by layer and side.

    Several graphs may have one layer, and sites of several layers the same name.
    """
    sums: dict[tuple[int, str, int], Tensor] = {}
    owners: list[GraphRecord | LayerProfile] = []  # alive as long as their ids are used
    for record, store in {id(s): (r, s) for r in records for s in r.stores}.values():
        tally = store.tally.double().cpu().view(-1, 3)  # a row for each kind that has a code
        _, size, count = tally.sum(0).tolist()
        if count and size:
            owners.append(record.layers.get(store.name.rpartition(".")[0]) or record)
            key = id(owners[-1]), store.name, len(tally)
            sums[key] = sums[key] + tally if key in sums else tally
    found = [(name, _error_and_drift(tally)) for (_, name, _), tally in sums.items()]
    return sorted(found, key=lambda pair: pair[0])


def _error_and_drift(tally: Tensor) -> tuple[float, float]:
    """Of ``[kinds, 3]``: the mean over the tokens, each relative to its own kind."""
    error, size, count = tally[(tally[:, 1:] > 0).all(1)].unbind(1)
    relative = (error / size * count).sum() / count.sum()
    return float(relative), float(error.sum() / count.sum())


def _tiers(stores: Iterable[SideStore]) -> tuple[float, ...]:
    """The shares of the tokens that lack 0, 1, 2, ... bits."""
    counts: list[Tensor] = []
    for store in stores:
        layout = store.ref.layout
        if layout.tier_shares and store.coded:
            lacks = layout.lacks(store.side.payload[layout.tokenwise - 1][:, : store.coded])
            counts.append(torch.bincount(lacks[lacks >= 0], minlength=len(TIERS) + 1))
    if not counts:
        return ()
    total = torch.stack([count.cpu() for count in counts]).sum(0)
    return tuple((total / total.sum()).tolist())


def _dropped(stores: Iterable[SideStore]) -> float:
    """The share of the coded tokens that are dropped, where any may be."""
    gone = total = 0
    for store in stores:
        absent = store.ref.layout.absent(store.side.payload)  # [B, C]
        if absent is None or not store.coded:
            continue
        gone += int((coded_tokens(store) & absent[:, : store.coded]).sum())
        total += int(real_tokens(store).sum())
    return gone / total if total else 0.0


def _graph_lines(number: int, graph: GraphReport) -> Iterable[str]:
    runs = ", ".join(f"{what} {count}" for what, count in graph.runs) or "not run"
    what = f"{len(graph.packed)} sites packed" if not graph.reason else f"stock: {graph.reason}"
    regions = f" and {graph.regions} operators" if graph.regions else ""
    yield f"  graph {number}: {what}; compiled {graph.compiles}x{regions}; runs: {runs}"
    matches = [f"{p.name} {p.matched}" for p in graph.passes if p.matched]
    if matches:
        yield f"    matched: {', '.join(matches)}"
    if graph.profile:
        yield f"    codes: {graph.profile}"
    for reason, names in _by_reason((s.where, s.reason) for s in graph.skipped):
        yield f"    left alone: {names}: {reason}"
    for reason, names in _by_reason(graph.notes):
        yield f"    {names}: {reason}"


def _by_reason(pairs: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    """Names that share a reason on one line, at most three of them spelled out."""
    grouped: dict[str, list[str]] = {}
    for name, reason in pairs:
        grouped.setdefault(reason, []).append(name)
    for reason, names in grouped.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield reason, ", ".join(names[:3]) + more


def report(model: nn.Module | None = None) -> Report:
    """What the backend did for ``model``, or for every model of the process.

    Args:
        model: the model, compiled or original, with graphs that do not show whose they are (those
            of offloaded models); None: everything since the last ``torch._dynamo.reset()``.
    """
    records = REGISTRY.all()
    if model is not None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r}: accepted is an nn.Module, or nothing for all models")
        parameters = tuple(model.parameters())
        records = tuple(r for r in records if r.is_of(parameters))
    stores = list({id(s): s for r in records for s in r.stores}.values())
    dense = sum(
        s.side.ring.shape[0] * s.side.ring.shape[1] * s.length * s.side.ring.shape[3]
        * s.dtype.itemsize for s in stores
    )  # fmt: skip
    codes = _codes(records)
    return Report(
        tuple(_graph_report(r) for r in records),
        sum(r.attends for r in records),
        dense,
        sum(s.nbytes for s in stores),
        total_bytes([s.ref for s in stores]),
        tuple((name, code.error) for name, code in codes),
        tuple((name, code.kinds) for name, code in codes if code.kinds is not None),
        tuple(_measured(records)),
        _tiers(stores),
        coded_part(stores),
        _dropped(stores),
        kind_parts(stores),
        predicted_bytes(stores),
        _predicted_step(records),
    )


def _predicted_step(records: Iterable[GraphRecord]) -> float | None:
    """Seconds of packed attention of all caches that are alive; None: unknown for one of them."""
    steps = [predicted_step(r.stores, r.q_heads) for r in records if r.stores]
    known = [step for step in steps if step is not None]
    return sum(known) if known and len(known) == len(steps) else None


def _codes(records: Iterable[GraphRecord]) -> list[tuple[str, Code]]:
    """The code of keys and of values of every fitted layer, once, however many graphs have it.

    A layer has one under each set of options; those that were compiled with last count.
    """
    fitted = [r for r in records if r.layers]
    last = [r for r in fitted if r.options == fitted[-1].options]
    layers = {id(layer): (name, layer) for r in last for name, layer in r.layers.items()}
    return sorted(
        (
            (f"{name}.{side}", ref.code)
            for name, layer in layers.values()
            for side, ref in zip("kv", layer.codes or (), strict=False)
        ),
        key=lambda pair: pair[0],
    )


def _graph_report(record: GraphRecord) -> GraphReport:
    return GraphReport(
        record.names, record.skipped, record.reason, tuple(record.runs.items()), record.compiles,
        tuple(record.notes.items()), record.profile, record.regions, tuple(record.passes.values()),
    )  # fmt: skip
