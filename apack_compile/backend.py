"""The backend that ``torch.compile(model, backend="attentionpack")`` finds by its entry point."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from . import hooks, ops  # noqa: F401  (registers the operators)
from .cache import PackedKV
from .compat import compile_inner
from .fitting.layer import PROFILES
from .fitting.learn import first_line
from .ops.region import clear_regions
from .options import Options, inductor_config
from .passes.plan import make_plan
from .runtime.graph import PackedGraph
from .runtime.stats import REGISTRY
from .runtime.stock import StockGraph
from .source_hash import keyed

log = logging.getLogger(__name__)


def attentionpack(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph; caches that it grows leave it packed.

    Args:
        gm: the graph.
        example_inputs: fake inputs.
        mode: as Inductor's, or ``"paper"``: the paper's code.
        options: see :class:`~apack_compile.options.Options`.

    Returns:
        What Dynamo's bytecode calls. Graphs without a cache run exactly as stock Inductor runs
        them.

    Raises:
        OptionError: an option or the mode is not accepted.
    """
    parsed = Options.parse(options, mode)
    config = inductor_config(mode, parsed)
    hooks.raise_recompile_limit()
    stock = partial(compile_inner, parsed.inner, config=config)
    record = REGISTRY.new()
    packed = any(isinstance(e, PackedKV) for e in example_inputs)
    if not packed and not _may_have_sites(gm.graph):
        record.reason = NO_ATTENTION
        return StockGraph(gm, example_inputs, stock, record)
    if torch.is_grad_enabled() and any(
        isinstance(e, torch.Tensor) and e.requires_grad for e in example_inputs
    ):
        record.reason = "inputs require grad: wrap inference in torch.no_grad()"
        log.warning("attentionpack: %s; this graph runs as stock Inductor runs it", record.reason)
        return StockGraph(gm, example_inputs, stock, record)
    try:
        plan = make_plan(gm.graph)
    except Exception as error:  # the model must run, whatever goes wrong here
        record.reason = f"a pass failed ({first_line(error)}): please report it"
        log.warning("attentionpack: %s; caches are left dense", record.reason, exc_info=True)
        return StockGraph(gm, example_inputs, stock, record)
    record.skipped = plan.skipped
    record.passed(plan.reports)
    if not plan.sites and not plan.handles:
        record.reason = NO_ATTENTION
        return StockGraph(gm, example_inputs, stock, record)
    record.options = parsed
    record.names = tuple(s.cached.site.node.name for s in plan.sites)
    record.q_heads = {s.cached.site.node.name: s.cached.site.heads for s in plan.sites}
    return PackedGraph(gm, plan, parsed, keyed(config), record)


NO_ATTENTION = "no attention with a growing cache"

ATTENTION = {"scaled_dot_product_attention", "softmax", "flex_attention"}


def _may_have_sites(graph: fx.Graph) -> bool:
    """A quick look: most graphs of a vision-language model have no attention at all."""
    names = {getattr(n.target, "__name__", n.target) for n in graph.nodes}
    return not names.isdisjoint(ATTENTION)


def reset() -> None:
    """Called by ``torch._dynamo.reset()``: forget all records, codes and artifacts; restore limits.

    The other hooks stay: they do nothing for other backends, and models that were compiled with
    this one go on being used after a reset.
    """
    REGISTRY.clear()
    PROFILES.clear()
    clear_regions()
    hooks.restore_recompile_limit()


attentionpack.reset = reset  # type: ignore[attr-defined]

hooks.install()
