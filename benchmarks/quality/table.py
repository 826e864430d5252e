"""Results as a markdown table, printed and put into docs/quality.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs" / "quality.md"

HEAD = (
    "| method | ratio | whole cache | KL | top-1 | perplexity | greedy | pass keys |\n"
    "|---|---|---|---|---|---|---|---|"
)


def markdown(results: Mapping[str, Any]) -> str:
    """One table a context length, methods by KL.

    Args:
        results: content of a result file.
    """
    parts = []
    for context in sorted({cell["context"] for cell in results["cells"]}):
        cells = [cell for cell in results["cells"] if cell["context"] == context]
        full = cells[0]["perplexity_full"]["mean"]
        rows = sorted(cells, key=lambda cell: cell["kl"]["mean"])
        windows = results["settings"]["windows"]
        parts.append(
            f"Context {context:,} tokens, {windows} windows, perplexity of the dense cache "
            f"{full:.2f}:\n\n" + "\n".join([HEAD, *map(row, rows)])
        )
    environment, command = results["environment"], results["command"]
    devices = dict.fromkeys(c.get("device", environment["device"]) for c in results["cells"])
    sources = Counter(c["sources"] for c in results["cells"] if "sources" in c)
    own = ", ".join(f"{name} ({count})" for name, count in sources.most_common())
    parts.append(
        f"`{command}` on {' and '.join(devices)}; torch {environment['torch']}, transformers "
        f"{environment['transformers']}."
        + (f" Cells of ours by digest of the sources that made them: {own}." if own else "")
    )
    return "\n\n".join(parts)


def row(cell: Mapping[str, Any]) -> str:
    """A table row of a cell."""
    kl, top1, keys = cell["kl"], cell["top1"], cell["by_window"]["passkeys"]
    return " | ".join(
        [
            f"| {cell['method']}",
            f"{cell['ratio']:.2f}",
            f"{cell['whole_ratio']:.2f}",
            f"{kl['mean']:.2g} ({kl['low']:.2g} to {kl['high']:.2g})",
            f"{top1['mean']:.1%} ({top1['low']:.1%} to {top1['high']:.1%})",
            f"{cell['perplexity']['mean']:.2f}",
            f"{cell['greedy']['mean']:.0f}",
            f"{sum(map(int, keys))} of {len(keys)} |",
        ]
    )


def embed(document: str, name: str, content: str) -> str:
    """``document`` with what is between the marks of ``name`` replaced.

    Raises:
        ValueError: the marks are not there.
    """
    start, end = f"<!-- results: {name} -->\n", f"<!-- end: {name} -->"
    if document.count(start) != 1 or document.count(end) != 1:
        raise ValueError(f"marks {start.strip()} and {end} are wanted once each")
    before, _, rest = document.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{content}\n\n{end}{after}"


def best(cells: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The Pareto front: cells that no other one beats in ratio and KL both, by ratio."""
    front: list[Mapping[str, Any]] = []
    for cell in sorted(cells, key=lambda c: (-c["ratio"], c["kl"]["mean"])):
        if not front or cell["kl"]["mean"] < front[-1]["kl"]["mean"]:
            front.append(cell)
    return front[::-1]
