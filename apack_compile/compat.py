"""Every difference between the versions of torch that are supported, in one place."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx
from torch._dynamo.convert_frame import compile_lock

COMPILING = compile_lock
"""Held by whoever compiles: Dynamo and Inductor change settings of the whole process meanwhile."""

log = logging.getLogger(__name__)

OLDEST, FIRST_UNTESTED = (2, 11), (2, 14)

FLOAT = "apack_float"
"""In the meta of an input: whether it is a Python float, as a tensor of one number."""

CHECKS = "assert_indirect_indexing"
"""Inductor's setting: generated code checks indices into tensors."""


def torch_version() -> tuple[int, int]:
    """Major and minor version of torch."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def check_torch() -> None:
    """Refuse a torch that this package cannot work with.

    Raises:
        ImportError: names the version found and those supported.
    """
    if not OLDEST <= torch_version() < FIRST_UNTESTED:
        raise ImportError(
            f"attentionpack supports torch {OLDEST[0]}.{OLDEST[1]} up to, but not including, "
            f"{FIRST_UNTESTED[0]}.{FIRST_UNTESTED[1]}; this is torch {torch.__version__}"
        )


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Keeps a caller's autocast away from sums and codes."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def run_uncompiled(function: Any) -> None:
    """Let Dynamo compile neither calls of ``function`` nor what they call, where code runs eagerly.

    Inlined into a graph it is traced as before; ``torch.compiler.disable`` would break the graph.
    """
    from torch._dynamo.eval_frame import set_code_exec_strategy
    from torch._dynamo.types import FrameAction, FrameExecStrategy

    strategy = FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP)
    set_code_exec_strategy(function.__code__, strategy)


def compile_inner(
    inner: str, gm: fx.GraphModule, inputs: Sequence[Any], config: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a graph of plain tensors.

    Args:
        inner: ``inductor``; ``aot_eager`` to run the operators that AOTAutograd traces one by one,
            for debugging; ``eager`` to run the graph as it is, which takes no time to compile.
        gm: the graph; the compiler takes it over.
        inputs: fake inputs.
        config: Inductor settings.
    """
    if inner == "eager":
        return gm
    if inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, list(inputs))
    from .lower import compile_decode, is_decode

    if is_decode(gm, inputs):
        return compile_decode(gm, inputs, config, _inductor)
    return _inductor(gm, inputs, config)


def _inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], config: dict[str, Any]
) -> Callable[..., Any]:
    """Inductor, on graphs with our operators without padded strides and its own CUDA graphs.

    Packed caches outlive the next call, which would write to the same memory. Decode has CUDA
    graphs of ours (``lower/``), and a prefill has nothing to gain.

    A tensor that is read through a view and by an operator of ours as well, such as keys that are
    repeated for attention and encoded, was written in one layout and read in another (torch 2.11,
    CUDA: strides are padded when the view is made, and chosen anew when the graph is finished).
    """
    if any(getattr(node.target, "namespace", "") == "apack" for node in gm.graph.nodes):
        config = {**config, "comprehensive_padding": False, "triton.cudagraphs": False}
    if torch_version() < (2, 13):
        return _without_checks_if_need_be(gm, inputs, config)
    return _compile_fx(gm, inputs, config)


def _compile_fx(
    gm: fx.GraphModule, inputs: Sequence[Any], config: dict[str, Any]
) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(inputs), config_patches=config)


def _without_checks_if_need_be(
    gm: fx.GraphModule, inputs: Sequence[Any], config: dict[str, Any]
) -> Callable[..., Any]:
    """Inductor of torch 2.11 and 2.12, whose C++ may check an index before it has computed it.

    Such code does not build, in decoders of Hugging Face; without the checks it does.
    """
    from torch._inductor.exc import CppCompileError, InductorError

    spare = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    spare.meta = dict(gm.meta)
    try:
        return _compile_fx(gm, inputs, config)
    except InductorError as error:
        if not isinstance(error.inner_exception, CppCompileError) or CHECKS in config:
            raise
    log.info("Inductor's C++ code does not build: compiled once more without checks of indices")
    return _compile_fx(spare, inputs, {**config, CHECKS: False})


def is_python_float(placeholder: fx.Node) -> bool:
    """Whether an input of a Dynamo graph is a Python float that Dynamo made a tensor of."""
    value = placeholder.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dim() or value.dtype != torch.float64:
        return False
    return "tensor_dict" not in placeholder.meta  # Dynamo notes one of each real tensor
