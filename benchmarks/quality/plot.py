"""Results as a plot: bytes of a coded token against KL, with the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..figure import pyplot, save
from .table import best


def plot(results: Mapping[str, Any], path: Path) -> bool:
    """Write the plot; False if matplotlib is not installed.

    Args:
        results: content of a result file.
        path: of the picture, its format by the suffix.
    """
    plots = pyplot()
    if plots is None:
        return False
    contexts = sorted({cell["context"] for cell in results["cells"]})
    figure, axes = plots.subplots(
        1, len(contexts), figsize=(5 + 4 * len(contexts), 6), squeeze=False, sharey=True
    )
    # The dense cache differs from itself by rounding only, which a log axis cannot show.
    coded = [cell for cell in results["cells"] if cell["ratio"] > 1]
    families = list(dict.fromkeys(cell["family"] for cell in coded))
    for axis, context in zip(axes[0], contexts, strict=True):
        here = [cell for cell in coded if cell["context"] == context]
        for number, family in enumerate(families):
            points = [cell for cell in here if cell["family"] == family]
            points.sort(key=lambda cell: cell["token_bytes"])
            _draw(axis, points, family, number)
        front = best(here)
        axis.plot(
            [cell["token_bytes"] for cell in front], [cell["kl"]["mean"] for cell in front],
            color="0.6", linewidth=5, alpha=0.5, zorder=0, label="Pareto front",
        )  # fmt: skip
        axis.set(
            xscale="log", yscale="log", title=f"{context:,} tokens of context",
            xlabel="bytes of a coded token, all layers",
        )  # fmt: skip
        axis.grid(True, which="both", alpha=0.2)
    axes[0][0].set_ylabel("KL(full || coded) per token, nats")
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    save(figure, path)
    plots.close(figure)
    return True


def _draw(axis: Any, points: list[Mapping[str, Any]], family: str, number: int) -> None:
    ours = family.startswith("attentionpack")
    means = [cell["kl"]["mean"] for cell in points]
    axis.errorbar(
        [cell["token_bytes"] for cell in points], means,
        yerr=[
            [cell["kl"]["mean"] - cell["kl"]["low"] for cell in points],
            [cell["kl"]["high"] - cell["kl"]["mean"] for cell in points],
        ],
        color=f"C{number % 10}", marker="os^Dv<>pP*"[number % 10], label=family, capsize=2,
        linestyle="-" if ours else ":", linewidth=1.5 if ours else 1,
    )  # fmt: skip
