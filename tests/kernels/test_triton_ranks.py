"""Rows of tokens in planes, counted: against sums over all tokens."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from apack_compile.kernels.triton.calls import INTERPRETED
from apack_compile.kernels.triton.ranks import rank_kernel

DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)


@pytest.mark.parametrize("planes", [1, 3, 5])
@pytest.mark.parametrize("kinds", [1, 2])
def test_rows_and_totals(planes: int, kinds: int) -> None:
    """Bug: behind 255 turns of its loop a count of eight bits began again.

    With two kinds the first has levels 0 to planes - 1 and drops none, the second those behind and
    drops the lowest of them.
    """
    batch, capacity, coded = 2, 6400, 6300  # 255 turns are 4,080 tokens here
    generator = torch.Generator().manual_seed(0)
    first, lost = planes, planes  # of the second kind
    highest = (first + planes) if kinds == 2 else planes - 1
    levels = torch.randint(highest + 1, (batch, capacity), generator=generator)
    levels[0, : capacity // 2] = planes - 1  # long runs of one level
    ranks = torch.full((batch, kinds, planes, capacity), -7, dtype=torch.int32, device=DEVICE)
    totals = torch.zeros(batch, kinds, planes, dtype=torch.int32, device=DEVICE)
    tile, block = 2048, 16
    tiles = -(-capacity // tile)
    given = levels.to(torch.uint8).to(DEVICE)
    lengths = torch.tensor([coded, 0], device=DEVICE)
    side = {"FIRST": 0, "LAST": planes - 1, "LOST": 254}
    side |= {"FIRST1": first + 1, "LAST1": first + planes, "LOST1": lost, "PLANES": planes}
    side["PAD"] = 1 << (planes - 1).bit_length()
    none = dict.fromkeys(side, 0) | {"PAD": 1}
    constants = {f"K{name}": value for name, value in side.items()}
    constants |= {f"V{name}": value for name, value in none.items()}
    programs = batch * tiles * kinds
    rank_kernel[(programs,)](
        given, given, lengths, ranks, ranks, totals, totals, capacity, tiles, programs,
        **constants, KINDS=kinds, T=tile, BLOCK=block, num_warps=1,
    )  # fmt: skip
    seen = (torch.arange(capacity) < coded).expand(batch, -1)
    for kind in range(kinds):
        low, high = (0, planes - 1) if kind == 0 else (first + 1, first + planes)
        dropped = seen & (levels == (254 if kind == 0 else lost))
        for plane in range(planes):
            has = seen & (levels >= low + plane) & (levels <= high)
            want = torch.where(has, has.cumsum(1) - 1, torch.where(dropped, -2, -1))
            assert torch.equal(ranks[:, kind, plane].cpu().long(), want)
            assert torch.equal(totals[:, kind, plane].cpu().long(), has.sum(1))
