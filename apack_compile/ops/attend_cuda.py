"""Packed attention on CUDA devices: which implementation runs, and how graphs get to see it.

``APACK_ATTEND`` in the environment forces one:

    triton_op    our Triton kernels, seen by Inductor as user kernels of the graph (the default)
    plain        the plain function, compiled by Inductor

What the kernels do not take (float32, more than 16 queries, codes of other kinds, no Triton) is
plain in any case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from ..codec import parse_layout
from ..kernels.attend import attend as plain_attend

CHOICES = ("triton_op", "plain")

MOST_QUERIES = 16
"""With more queries a step is bound by arithmetic, and dense attention does less of it."""


def choice() -> str:
    """What ``APACK_ATTEND`` asks for.

    Raises:
        ValueError: it is set to something else.
    """
    name = os.environ.get("APACK_ATTEND", CHOICES[0])
    if name not in CHOICES:
        raise ValueError(f"APACK_ATTEND={name!r}: accepted are {', '.join(CHOICES)}")
    return name


@cache
def _launch() -> Any:
    """The module that launches the kernels; None without Triton."""
    try:
        from ..kernels.triton import launch
    except ImportError:
        return None
    return launch


def by_kernels(q: Tensor, k_layout: str, v_layout: str) -> bool:
    """Whether our kernels attend with these queries and codes."""
    if q.device.type != "cuda" or choice() == "plain" or q.shape[2] > MOST_QUERIES:
        return False
    launch = _launch()
    return launch is not None and launch.takes(q, k_layout, v_layout)


def attend(
    q: Tensor, mask: Tensor | None, k: Sequence[Tensor], v: Sequence[Tensor], lengths: Tensor,
    scale: float, k_layout: str, v_layout: str, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`~apack_compile.kernels.attend.attend` by kernels where they apply, else plain."""
    if not by_kernels(q, k_layout, v_layout):
        return plain_attend(q, mask, k, v, lengths, scale, k_layout, v_layout, softcap, sinks)
    bias = None
    if mask is not None:
        payload, *_, ring = k[: len(parse_layout(k_layout).payload_fields(k[0].dtype)) + 3]
        bias = torch.ops.apack.score_bias(mask, lengths, payload.shape[1], ring.shape[2], q.dtype)
    return launch_kernels(q, bias, k, v, lengths, scale, k_layout, v_layout, softcap, sinks)


def launch_kernels(*args: Any) -> Tensor:
    """``attend_packed`` of the kernels, where :func:`by_kernels` says that they apply."""
    return _launch().attend_packed(*args)


def outside_graphs(meaning: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator outside compiled graphs: kernels are launched as they are.

    Args:
        meaning: takes the queries first.
    """

    def run(*args: Any) -> Tensor:
        from torch._library.triton import set_wrap_triton_enabled

        # Triton launches on the current device, wherever the tensors are.
        with set_wrap_triton_enabled(False), torch.cuda.device_of(args[0]):
            return meaning(*args)

    return run


eager_attend = outside_graphs(attend)


def show_kernels_to_graphs(
    library: torch.library.Library, name: str = "apack::attend",
    meaning: Callable[..., Tensor] = attend,
) -> None:  # fmt: skip
    """Let AOTAutograd trace through an operator where it is kernels.

    The same rule as that of ``torch.library.triton_op``, for the cases that we take. In all others
    the operator stays one node. Its arguments are those of ``apack::attend``, or like them.
    """

    def rule(mode: FunctionalTensorMode, op: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if kwargs or not by_kernels(args[0], *args[6:8]):
            return mode.__torch_dispatch__(op, types, args, kwargs or {})
        with mode:
            return meaning(*args)

    torch.library.register_torch_dispatch(name, FunctionalTensorMode, rule, lib=library)
