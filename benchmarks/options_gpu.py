"""Packed attention of one decode step on a GPU by option: kernels, and options that have none yet.

Codes are those that ratio 8 gives in the mean (8, 4 and 2 bits), fitted on nothing. Options without
kernels of their own run as plain operators that Inductor compiles. Median over replays of a CUDA
graph, beside the fastest dense attention of the same run.

    python benchmarks/options_gpu.py --out benchmarks/results/options-h100.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from apack_compile.cache import Policy, SideStore
from apack_compile.codec import Code, CodeRef, TransformLayout
from apack_compile.codec.evicting import evicting
from apack_compile.codec.tiered import TIERS, layout_of

sys.path.insert(0, str(Path(__file__).resolve().parent))
from attend_gpu import (
    CASES,
    DIM,
    DTYPE,
    LIVE,
    Case,
    dense_times,
    layouts,
    milliseconds,
    random_code,
)

NAMES = ("B1 28/4 S4096", "B8 28/4 S32768")
WAVES = 1e6 ** -(torch.arange(DIM) % (DIM // 2) / (DIM // 2))
"""Radians a position of each channel, as in Qwen2.5."""


def variants(k: TransformLayout, v: TransformLayout) -> dict[str, tuple[Any, Any]]:
    """Layouts of keys and values by option."""
    tiers = layout_of((v.heads, v.dim, v.groups), (v.r8, v.r4, v.r2), True, TIERS)
    return {
        "none": (k, v),
        "k_code='pre-rope'": (replace(k, rotary=DIM), v),
        "tiers=True": (k, tiers),
        "exact_share=0.01": (replace(k, exact=10), replace(v, exact=10)),
        "evict=0.3": (evicting(k, 10), evicting(v, 10)),
    }


def code_of(layout: Any, device: str) -> Code:
    """A random code with what tiers and rotation need."""
    params = [*random_code(layout, device).params]
    if layout.tier_shares:
        params.append(torch.ones(len(layout.tier_shares) + 1, device=device))
    if layout.positional:
        params.append(torch.stack([WAVES, 0 * WAVES]).to(device))
    return Code(layout, tuple(params))


def packed(layout: Any, x: Tensor, importance: Tensor) -> list[Tensor]:
    """One side of the packed layer, flat."""
    ref = CodeRef(code_of(layout, str(x.device)))
    policy = Policy(window=LIVE, block=96 - LIVE)
    store = SideStore.encode(x, ref, policy, None, importance)
    return [*store.tensors(), *ref.code.on(x.device)]


def measure(case: Case) -> dict[str, float]:
    """Microseconds by option, and of dense attention."""
    rows = {"dense": 1e3 * min(t for n, t in dense_times(case).items() if not n.startswith("cat"))}
    x = torch.randn(case.batch, case.heads, case.tokens, DIM, device="cuda", dtype=DTYPE)
    q = torch.randn(case.batch, case.q_heads, 1, DIM, device="cuda", dtype=DTYPE)
    importance = torch.rand(case.batch, case.tokens, device="cuda")
    lengths = torch.tensor([case.tokens - LIVE, LIVE], device="cuda")
    for name, (k, v) in variants(*layouts(case, mixed=True)).items():
        sides = [packed(layout, x, importance) for layout in (k, v)]

        def attend(q: Tensor, k_side: Any, v_side: Any, specs: Any = (k.spec, v.spec)) -> Tensor:
            return torch.ops.apack.attend(q, None, k_side, v_side, lengths, DIM**-0.5, *specs)

        torch._dynamo.reset()
        compiled = torch.compile(attend)
        rows[name] = 1e3 * milliseconds([partial(compiled, q, *sides)], 4, 7)
        print(name, rows[name], flush=True)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="where to write the results")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "command": "python benchmarks/options_gpu.py",
        "microseconds": {},
    }  # fmt: skip
    for name in NAMES:
        report["microseconds"][name] = measure(CASES[name])
        print(json.dumps({name: report["microseconds"][name]}), flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
