"""Encoding on CUDA devices: by our Triton kernels where they apply.

``APACK_ATTEND=plain`` turns them off, as it does those of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..codec import Layout, parse_layout
from ..kernels.encode import encode as plain_encode
from .attend_cuda import choice


@cache
def _launch() -> Any:
    """The module that launches the kernels; None without Triton."""
    try:
        from ..kernels.triton import launch_encode
    except ImportError:
        return None
    return launch_encode


def encode_kernels(x: Tensor, layout: Layout) -> Any:
    """The module that codes these tokens by kernels; None if they do not apply."""
    if x.device.type != "cuda" or choice() == "plain":
        return None
    launch = _launch()
    return launch if launch is not None and launch.takes(x, layout) else None


def encode(
    x: Tensor, visible: Tensor | None, params: Sequence[Tensor], layout: str, *settings: Any
) -> list[Tensor]:
    """:func:`~apack_compile.kernels.encode.encode` by kernels where they apply, else plain."""
    code = parse_layout(layout)
    kernels = encode_kernels(x, code)
    if kernels is None:
        return plain_encode(x, visible, params, layout, *settings)
    return kernels.encode_new(x, visible, params, code, *settings[:5])  # no planes: no importance


def for_inductor(
    x: Tensor, visible: Tensor | None, params: Sequence[Tensor], layout: str, *settings: Any
) -> list[Tensor]:
    """What Inductor makes of ``apack::encode``: a call of the kernels, or a compiled region."""
    op = torch.ops.apack.encode_region
    if encode_kernels(x, parse_layout(layout)) is not None:
        op = torch.ops.apack.encode_kernels
    return op(x, visible, params, layout, *settings)
