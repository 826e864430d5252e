"""How kernels are launched: seen by Inductor as user kernels of the graph, or interpreted."""

from __future__ import annotations

from typing import Any

from torch.library import wrap_triton
from triton.runtime import JITFunction

from .attend import attend_kernel

INTERPRETED = not isinstance(attend_kernel, JITFunction)
"""Whether Triton interprets the kernels (TRITON_INTERPRET=1), on whatever device."""


def kernel(fn: Any) -> Any:
    """The kernel, to be launched by ``kernel(fn)[grid](...)``."""
    return fn if INTERPRETED else wrap_triton(fn)
