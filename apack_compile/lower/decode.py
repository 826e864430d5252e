"""Compile a decode graph: share what layers share, and capture it where the user wants that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx
from torch._guards import TracingContext, detect_fake_mode, tracing

from .capture import Captured
from .share_bias import share_bias
from .split import ATTENDS, Halves, Inseparable, Place, split
from .values import values_of

log = logging.getLogger(__name__)

Compiler = Callable[[fx.GraphModule, Sequence[Any], dict[str, Any]], Callable[..., Any]]

CUDAGRAPHS = "triton.cudagraphs"
PADDING = "comprehensive_padding"


def is_decode(gm: fx.GraphModule, fakes: Sequence[Any]) -> bool:
    """Whether a graph attends to packed caches on a GPU."""
    on_gpu = any(isinstance(f, Tensor) and f.device.type == "cuda" for f in fakes)
    return on_gpu and any(n.target in ATTENDS for n in gm.graph.nodes)


def compile_decode(
    gm: fx.GraphModule, fakes: Sequence[Any], config: dict[str, Any], inductor: Compiler
) -> Callable[..., Any]:
    """Compile a graph with packed attention.

    Inductor's own CUDA graphs do not suit it: it writes to packed caches, and lengths that change
    with every step would be captured anew each time. Ours do not change what a step means and
    take little memory, so they are used unless Inductor's setting ``triton.cudagraphs`` is False.

    Args:
        gm: the graph, taken over.
        fakes: its arguments.
        config: Inductor settings.
        inductor: compiles a graph of plain tensors.
    """
    mode = detect_fake_mode(fakes)
    values = values_of(gm, fakes, mode)
    share_bias(gm.graph, values)
    gm.recompile()
    settings = {**config, CUDAGRAPHS: False, PADDING: False}  # the halves agree on strides
    if config.get(CUDAGRAPHS, True):
        try:
            halves = split(gm, values)
        except Inseparable as reason:
            log.info("attentionpack: no CUDA graph of this decode step: %s", reason)
        else:
            return _in_halves(halves, settings, inductor)
    return inductor(gm, fakes, settings)


def _in_halves(
    halves: Halves, config: dict[str, Any], inductor: Compiler
) -> Callable[..., list[Any]]:
    def compiled(part: fx.GraphModule, fakes: Sequence[Any]) -> Callable[..., Any]:
        with tracing(TracingContext(detect_fake_mode(fakes))):
            return inductor(part, fakes, config)

    head = compiled(halves.head, halves.head_fakes)
    body = Captured(compiled(halves.body, halves.body_fakes), halves.storage)

    def run(*args: Any) -> list[Any]:
        made: dict[str, Sequence[Any]] = {"args": args}

        def get(place: Place) -> Any:
            where, which = place
            return which if where == "constant" else made[where][which]

        made["head"] = head(*map(get, halves.head_inputs))
        made["body"] = body(list(map(get, halves.body_inputs)))
        return list(map(get, halves.outputs))

    return run
