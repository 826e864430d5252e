"""Decode time that the cost model predicts of the codes that were measured, beside their KL.

Time is that of packed attention of one layer in one step on an H100: 8 sequences, 32,768 coded
tokens of a prompt, 16 bits. The model says nothing of tiers together with evictions or shares of
exact tokens; codes by kind are left out here, as their time depends on the mixture. It was compared
with measurements at ratio 8 and head dimension 128 alone, options on an H200: docs/cost-model.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from apack_compile.cache import Policy
from apack_compile.cost import H100, PackedSide, is_predicted, seconds_of

from ..figure import pyplot, save

BATCH, TOKENS = 8, 32_768


def attend_us(codes: Iterable[tuple[Any, Any]], q_heads: int) -> float | None:
    """Microseconds of a layer, the mean of all; None if a code is not predicted, or by kind.

    Args:
        codes: of keys and of values of each layer.
        q_heads: query heads.
    """
    times = []
    for pair in codes:
        k, v = (PackedSide.of(ref, Policy(), torch.bfloat16) for ref in pair)
        if k.layout.plane_kinds or not is_predicted(k, v):
            return None
        times.append(1e6 * seconds_of(k, v, q_heads, H100, BATCH, TOKENS))
    return sum(times) / len(times)


def predicted(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Cells with a predicted time, the fastest first."""
    cells = [cell for cell in results["cells"] if cell.get("attend_us") is not None]
    return sorted(cells, key=lambda cell: cell["attend_us"])


def markdown(results: Mapping[str, Any]) -> str:
    """One row a code.

    Args:
        results: content of a result file.
    """
    lines = ["| code | ratio | us, predicted | KL | top-1 |", "|---|---|---|---|---|"]
    for cell in predicted(results):
        lines.append(
            f"| {cell['method']} | {cell['ratio']:.2f} | {cell['attend_us']:.1f} | "
            f"{cell['kl']['mean']:.2g} | {cell['top1']['mean']:.1%} |"
        )
    return "\n".join(lines)


def plot(results: Mapping[str, Any], path: Path) -> bool:
    """Write the plot of time against KL; False if matplotlib is not installed.

    Args:
        results: content of a result file.
        path: of the picture, its format by the suffix.
    """
    plots = pyplot()
    if plots is None:
        return False
    cells = predicted(results)
    figure, axis = plots.subplots(figsize=(7, 5))
    for family in dict.fromkeys(cell["family"] for cell in cells):
        _line(axis, [cell for cell in cells if cell["family"] == family], family)
    axis.set(
        yscale="log", ylabel="KL(full || coded) per token, nats",
        xlabel=f"us of packed attention of one layer, predicted: H100, B {BATCH}, S {TOKENS:,}",
    )  # fmt: skip
    axis.grid(True, which="both", alpha=0.2)
    axis.legend(frameon=False)
    save(figure, path)
    plots.close(figure)
    return True


def _line(axis: Any, cells: Sequence[Mapping[str, Any]], family: str) -> None:
    means = [cell["kl"]["mean"] for cell in cells]
    axis.errorbar(
        [cell["attend_us"] for cell in cells], means,
        yerr=[
            [cell["kl"]["mean"] - cell["kl"]["low"] for cell in cells],
            [cell["kl"]["high"] - cell["kl"]["mean"] for cell in cells],
        ],
        marker="o", capsize=2, label=family,
    )  # fmt: skip
    for cell in cells:
        axis.annotate(
            f"{cell['ratio']:.0f}x", (cell["attend_us"], cell["kl"]["mean"]),
            xytext=(4, 4), textcoords="offset points",
        )  # fmt: skip
