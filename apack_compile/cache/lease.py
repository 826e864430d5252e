"""Claims of handles on a store, and the mode in which what they share may be written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ..compat import full_precision


@contextmanager
def writing(tensors: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """What was made in inference mode may be written in inference mode only; no autocast."""
    inference = any(t.is_inference() for t in tensors)
    mode = torch.inference_mode() if inference else nullcontext()
    with mode, full_precision(device):
        yield


class Lease:
    """A handle's claim on a length of a store."""

    __slots__ = ("__weakref__", "length")

    def __init__(self, length: int) -> None:
        self.length = length
