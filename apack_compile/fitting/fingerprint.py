"""Fingerprints of weights by their content: what a profile on disk was fitted for.

A digest covers shape, dtype, sums over all numbers and a sample of them. Numbers are read as the
integers that their bits are and added in 64-bit arithmetic, so that the order of additions, and
with it the device, makes no difference. The second sum weighs rows by their number: exchanged
rows (heads, say) are another weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SAMPLE = 256
"""Numbers of each weight that are taken as they are, at equal distances."""

CHUNK = 1 << 22
"""Numbers that are widened to 64 bits at a time."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    bits = weight.detach().contiguous().view(_INTEGERS[weight.element_size()])
    width = bits.shape[-1] if bits.dim() > 1 else 1
    rows = bits.reshape(-1, max(width, 1))
    sums = [part.sum(-1, dtype=torch.int64) for part in rows.split(max(CHUNK // max(width, 1), 1))]
    total = torch.cat(sums)  # [rows]
    order = torch.arange(1, len(total) + 1, device=total.device)
    flat = bits.flatten()
    sample = flat[:: max(len(flat) // SAMPLE, 1)][:SAMPLE].to(torch.int64)
    return torch.cat([torch.stack([total.sum(), (total * order).sum()]), sample])
