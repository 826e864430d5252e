"""Fingerprints of weights by their content: what a profile on disk was fitted for.

A digest covers shape, dtype, sums over all bytes and a sample of them. Bytes are read as the widest
integers that fit a row and added in 64-bit arithmetic, so that the order of additions, and with it
the device, makes no difference. The second sum weighs rows by their number: exchanged rows (heads,
say) are another weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SAMPLE = 256
"""Integers of each weight that are taken as they are, at equal distances."""

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def digests(weights: Sequence[Tensor]) -> list[str]:
    """A digest of each weight, 32 hexadecimal digits; one copy from each device.

    Raises:
        RuntimeError: a weight does not show its bits (some quantised tensor subclasses).
    """
    facts = [_facts(w) for w in weights]  # int64 [2 + samples] each
    on_host: list[Tensor] = [torch.empty(0)] * len(facts)
    for device in {f.device for f in facts}:
        here = [i for i, f in enumerate(facts) if f.device == device]
        together = torch.cat([facts[i] for i in here]).cpu()
        for i, part in zip(here, together.split([len(facts[i]) for i in here]), strict=True):
            on_host[i] = part
    return [
        _sha256([str(w.dtype), str(tuple(w.shape)), *map(str, numbers.tolist())])
        for w, numbers in zip(weights, on_host, strict=True)
    ]


def fingerprint(weights: Iterable[str]) -> str:
    """Of several weights, from their digests, whatever their order."""
    return _sha256(sorted(set(weights)))


def _sha256(words: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]


@torch.no_grad()
def _facts(weight: Tensor) -> Tensor:
    """Sum, sum weighted by row, and sample of a weight: int64."""
    if type(weight) not in (Tensor, torch.nn.Parameter):
        raise RuntimeError(f"a weight is a {type(weight).__name__}")
    weight = weight.detach().contiguous()
    row = weight.element_size() * (weight.shape[-1] if weight.dim() > 1 else 1)  # bytes
    size = next(size for size in _INTEGERS if row % size == 0)
    if weight.data_ptr() % size:
        weight = weight.clone()  # a view into a storage, begun between two integers
    integers = weight.flatten().view(_INTEGERS[min(size, weight.element_size())])
    integers = integers.view(_INTEGERS[size])
    rows = integers.view(-1, max(row // size, 1)).sum(-1, dtype=torch.int64)
    order = torch.arange(1, len(rows) + 1, device=rows.device)
    sample = integers[:: max(len(integers) // SAMPLE, 1)][:SAMPLE].to(torch.int64)
    return torch.cat([torch.stack([rows.sum(), (rows * order).sum()]), sample])
