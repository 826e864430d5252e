"""``apack::attend_with_bias``: packed attention whose mask has been brought to physical slots.

    attend(q, mask, ...)  =  attend_with_bias(q, score_bias(mask, ...), ...)

One ``score_bias`` then serves all layers. As ``apack::attend`` it is our kernels on CUDA, and what
Inductor compiles once for all layers anywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import register_decomposition

from ..codec import parse_layout
from ..ops.attend_cuda import by_kernels, launch_kernels, outside_graphs, show_kernels_to_graphs

_LIB = torch.library.Library("apack", "FRAGMENT")
_LIB.define(
    "attend_with_bias(Tensor q, Tensor bias, Tensor[] k, Tensor[] v, Tensor lengths, float scale, "
    "str k_layout, str v_layout, float softcap=0.0, Tensor? sinks=None) -> Tensor"
)


def attend_with_bias(
    q: Tensor, bias: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], lengths: Tensor,
    scale: float, k_layout: str, v_layout: str, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`~apack_compile.kernels.attend.attend_biased`, by kernels where they apply."""
    if by_kernels(q, k_layout, v_layout):
        return launch_kernels(q, bias, k, v, lengths, scale, k_layout, v_layout, softcap, sinks)
    return torch.ops.apack.attend_biased(
        q, bias, k, v, lengths, scale, k_layout, v_layout, softcap, sinks
    )


def _fake(
    q: Tensor, bias: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], lengths: Tensor,
    scale: float, k_layout: str, v_layout: str, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], parse_layout(v_layout).dim)


def _for_inductor(*args: Any) -> Tensor:
    return torch.ops.apack.attend_region(*args)


_LIB.impl("attend_with_bias", outside_graphs(attend_with_bias), "CompositeExplicitAutograd")
torch.library.register_fake("apack::attend_with_bias", _fake, lib=_LIB)
register_decomposition(torch.ops.apack.attend_with_bias.default)(_for_inductor)
show_kernels_to_graphs(_LIB, "apack::attend_with_bias", attend_with_bias)
