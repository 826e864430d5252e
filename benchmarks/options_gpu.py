"""Packed attention of one decode step on a GPU by option, at about equal bytes of the cache.

Codes have components of 8, 4 and 2 bits and are fitted on nothing. With ``--plain`` also by the
plain operators that Inductor compiles. Median over replays of a CUDA graph, beside the fastest
dense attention of the same run and what the cost model predicts, where it knows the device and the
kernels.

    python benchmarks/options_gpu.py --out benchmarks/results/options-h100.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from apack_compile.cache import Policy, SideStore
from apack_compile.codec import Code, CodeRef, ModalLayout, TransformLayout
from apack_compile.codec.evicting import evicting
from apack_compile.codec.modal import joined, modal
from apack_compile.codec.tiered import TIERS, layout_of
from apack_compile.cost import PackedSide, device_named, is_predicted, seconds_of

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

POLICY = Policy(window=LIVE, block=96 - LIVE)
SEEN = 0.8
"""Of the tokens, how many are visual."""

NAMES = ("B1 28/4 S4096", "B8 28/4 S32768")
WAVES = 1e6 ** -(torch.arange(DIM) % (DIM // 2) / (DIM // 2))
"""Radians a position of each channel, as in Qwen2.5."""


def sized(layout: TransformLayout, *eighths: int) -> TransformLayout:
    """A layout with so many components of 8, 4 and 2 bits, in eighths of those that ratio 8 has
    of 4 bits."""
    r8, r4, r2 = (layout.r4 * n // 8 for n in eighths)
    return replace(layout, r8=r8, r4=r4, r2=r2)


def variants(k: TransformLayout, v: TransformLayout) -> dict[str, tuple[Any, Any]]:
    """Layouts of keys and values by option, of about the same size."""

    def tiered(*eighths: int) -> TransformLayout:
        wide = sized(v, *eighths)
        return layout_of((v.heads, v.dim, v.groups), (wide.r8, wide.r4, wide.r2), True, TIERS)

    more = evicting(sized(k, 4, 8, 16), 10)
    kept = sized(k, 2, 8, 5), sized(v, 2, 7, 6)
    text = 4, 16, 12
    kinds = (modal(sized(x, 1, 4, n), sized(x, *text)) for x, n in ((k, 4), (v, 3)))
    together = (
        modal(evicting(sized(k, 2, 8, 8), 10), sized(k, *text)),
        modal(evicting(tiered(2, 10, 12), 10), tiered(16, 16, 0)),
    )
    return {
        "none": (k, v),
        "k_code='pre-rope'": (replace(k, rotary=DIM), v),
        "tiers=True": (k, tiered(8, 8, 16)),
        "exact_share=0.01": (replace(kept[0], exact=10), replace(kept[1], exact=10)),
        "evict=0.3": (more, evicting(sized(v, 4, 8, 14), 10)),
        "tiers=True, evict=0.3": (more, evicting(tiered(8, 16, 8), 10)),
        "visual_ratio=16, text_ratio=4.5": (next(kinds), next(kinds)),
        "visual_ratio=16, text_ratio=4.5, tiers=True, evict=0.3": together,
    }  # fmt: skip


def code_of(layout: Any, device: str) -> Code:
    """A random code with what tiers, rotation and kinds need."""
    if isinstance(layout, ModalLayout):
        return joined(code_of(layout.visual, device), code_of(layout.text, device), (1, 1))
    params = [*random_code(layout, device).params]
    if layout.tier_shares:
        params.append(torch.ones(len(layout.tier_shares) + 1, device=device))
    if layout.positional:
        params.append(torch.stack([WAVES, 0 * WAVES]).to(device))
    return Code(layout, tuple(params))


def packed(layout: Any, x: Tensor, importance: Tensor) -> list[Tensor]:
    """One side of the packed layer, flat; ``SEEN`` of the tokens are visual."""
    ref = CodeRef(code_of(layout, str(x.device)))
    store = SideStore.encode(x, ref, POLICY, None, importance, importance < SEEN)
    return [*store.tensors(), *ref.code.on(x.device)]


def predicted_us(case: Case, k: Any, v: Any, device: str) -> float | None:
    """What the cost model says; None: it does not know the device, or the kernels."""
    known, coded = device_named(device), case.tokens - LIVE
    visual = round(SEEN * coded)
    kinds = (coded - visual, visual) if k.plane_kinds else None
    sides = [PackedSide(layout, POLICY, DTYPE, kinds=kinds) for layout in (k, v)]
    if known is None or not is_predicted(*sides):
        return None
    return 1e6 * seconds_of(*sides, case.q_heads, known, case.batch, coded)


def measure(case: Case, names: Sequence[str], plain: bool) -> dict[str, Any]:
    """Microseconds by option, measured and predicted, MB of the packed layer; dense attention."""
    megabytes: dict[str, float] = {}
    predicted: dict[str, float | None] = {}
    rows = {"dense": 1e3 * min(t for n, t in dense_times(case).items() if not n.startswith("cat"))}
    x = torch.randn(case.batch, case.heads, case.tokens, DIM, device="cuda", dtype=DTYPE)
    q = torch.randn(case.batch, case.q_heads, 1, DIM, device="cuda", dtype=DTYPE)
    importance = torch.rand(case.batch, case.tokens, device="cuda")
    lengths = torch.tensor([case.tokens - LIVE, LIVE], device="cuda")
    every = variants(*layouts(case, mixed=True))
    for name in names or every:
        k, v = every[name]
        sides = [packed(layout, x, importance) for layout in (k, v)]

        def attend(q: Tensor, k_side: Any, v_side: Any, specs: Any = (k.spec, v.spec)) -> Tensor:
            return torch.ops.apack.attend(q, None, k_side, v_side, lengths, DIM**-0.5, *specs)

        for choice in ("triton_op", "plain") if plain else ("triton_op",):
            os.environ["APACK_ATTEND"] = choice
            torch._dynamo.reset()
            compiled = torch.compile(attend)
            label = name if choice == "triton_op" else f"{name}, plain operators"
            rows[label] = 1e3 * milliseconds([partial(compiled, q, *sides)], 4, 7)
            print(label, rows[label], flush=True)
        predicted[name] = predicted_us(case, k, v, torch.cuda.get_device_name())
        fields = len(k.payload_fields(DTYPE)), len(v.payload_fields(DTYPE))
        stored = [t for side, count in zip(sides, fields, strict=True) for t in side[: count + 3]]
        megabytes[name] = sum(t.numel() * t.itemsize for t in stored) / 1e6
    return {"microseconds": rows, "predicted": predicted, "megabytes": megabytes}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--options", nargs="+", default=(), help="these options only")
    parser.add_argument("--plain", action="store_true", help="also by plain operators")
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=NAMES, help="of these only")
    parser.add_argument("--out", type=Path, help="where to write the results")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__,
        "command": " ".join(["python", "benchmarks/options_gpu.py", *sys.argv[1:]]), "shapes": {},
    }  # fmt: skip
    for name in args.shapes:
        report["shapes"][name] = measure(CASES[name], args.options, args.plain)
        print(json.dumps({name: report["shapes"][name]}), flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
