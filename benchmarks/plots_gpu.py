"""Plots of ``attend-<device>.json``: speed and bytes by context length, and the roofline.

python benchmarks/plots_gpu.py benchmarks/results/attend-h100.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KINDS = ("8 bit", "mixed")
DIM = 128


def parse(name: str) -> tuple[int, int, int, int]:
    """Batch, query heads, KV heads and tokens of a case, by its name."""
    batch, heads, tokens = name.split()
    q_heads, kv_heads = heads.split("/")
    return int(batch[1:]), int(q_heads), int(kv_heads), int(tokens[1:])


def dense_bytes(name: str) -> int:
    """Bytes of the same tokens in 16 bits."""
    batch, _, heads, tokens = parse(name)
    return 4 * batch * heads * tokens * DIM


def operations(name: str) -> int:
    """Floating-point operations of dense attention to the case; ours does an eighth or so more."""
    batch, q_heads, _, tokens = parse(name)
    return 4 * batch * q_heads * tokens * DIM


def by_length(axes: Any, cases: dict[str, Any], family: str) -> None:
    """Speed-up over dense attention and bytes, for all lengths of one family of shapes."""
    names = sorted((n for n in cases if n.startswith(family + " ")), key=lambda n: parse(n)[3])
    lengths = [parse(n)[3] for n in names]
    left, right = axes
    for kind in KINDS:
        left.plot(lengths, [cases[n][kind]["speedup"] for n in names], "o-", label=kind)
        right.plot(lengths, [cases[n][kind]["code_bytes"] / 1e6 for n in names], "o-", label=kind)
    left.axhline(1, color="grey", linewidth=0.8)
    right.plot(lengths, [dense_bytes(n) / 1e6 for n in names], "s--", color="grey", label="16 bit")
    left.set(title=f"{family}: times the fastest dense SDPA", xlabel="tokens", xscale="log")
    right.set(title=f"{family}: MB of one layer", xlabel="tokens", xscale="log", yscale="log")


def roofline(axis: Any, cases: dict[str, Any], copy_gb_s: float) -> None:
    """Operations a second over operations a byte, under the line that copying draws."""
    points = []
    for kind, marker in zip(KINDS, "ox", strict=True):
        for name, row in cases.items():
            ours = row[kind]
            seconds = ours["kernels_us"]["attend_kernel"] / 1e6
            points.append(operations(name) / ours["code_bytes"])
            axis.plot(points[-1], operations(name) / seconds / 1e12, marker, color="C0")
            axis.annotate(f"{name}, {kind}", (points[-1], operations(name) / seconds / 1e12),
                          fontsize=5, xytext=(3, 2), textcoords="offset points")  # fmt: skip
    ends = [min(points) / 1.5, max(points) * 1.5]
    axis.plot(ends, [x * copy_gb_s / 1e3 for x in ends], "-", color="grey", label="copy bandwidth")
    axis.set(title="roofline of attend_kernel", xscale="log", yscale="log",
             xlabel="operations a byte of codes", ylabel="10^12 operations a second")  # fmt: skip


def main(path: Path) -> Path:
    """Write the plots beside the results."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    report = json.loads(path.read_text())
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    by_length(axes[:2], report["cases"], "B8 28/4")
    roofline(axes[2], report["cases"], report["copy_gb_s"])
    for axis in axes:
        axis.legend(fontsize=7)
    figure.suptitle(f"{report['device']}, torch {report['torch']}, triton {report['triton']}")
    out = path.with_suffix(".svg")
    figure.savefig(out, metadata={"Date": None})
    return out


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
