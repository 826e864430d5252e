"""Results as a markdown table, printed and put into docs/quality.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs" / "quality.md"

Cell = Mapping[str, Any]


def _with_interval(figure: Cell, form: str) -> str:
    mean, low, high = (format(figure[name], form) for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _count(cell: Cell, name: str) -> str:
    keys = cell["by_window"][name]
    return f"{sum(map(int, keys))} of {len(keys)}"


def _points(lost: float) -> str:
    """Points more (+) or fewer than with the dense cache; never a negative nought."""
    return f"{round(-100 * lost, 1) + 0.0:+.1f}"


def _right(kind: str) -> Callable[[Cell], str]:
    def column(cell: Cell) -> str:
        lost = cell["lost"][kind]
        ends = f"{_points(lost['high'])} to {_points(lost['low'])}"
        return f"{cell[kind]['mean']:.1%} ({_points(lost['mean'])}; {ends})"

    return column


COMMON: dict[str, Callable[[Cell], str]] = {
    "method": lambda cell: cell["method"],
    "ratio": lambda cell: f"{cell['ratio']:.2f}",
    "whole cache": lambda cell: f"{cell['whole_ratio']:.2f}",
    "KL": lambda cell: _with_interval(cell["kl"], ".2g"),
    "top-1": lambda cell: _with_interval(cell["top1"], ".1%"),
}

PROSE: dict[str, Callable[[Cell], str]] = {
    **COMMON,
    "perplexity": lambda cell: f"{cell['perplexity']['mean']:.2f}",
    "greedy": lambda cell: f"{cell['greedy']['mean']:.0f}",
    "pass keys": partial(_count, name="passkeys"),
}

ALBUMS: dict[str, Callable[[Cell], str]] = {
    **COMMON, **{kind: _right(kind) for kind in ("which", "what", "needle", "read")},
}  # fmt: skip
"""Right answers, and in brackets points more than with the dense cache, with their interval."""


QUESTIONS: dict[str, Callable[[Cell], str]] = {
    **{name: COMMON[name] for name in ("method", "ratio", "whole cache")},
    "first question": lambda cell: _with_interval(cell["first"], ".1%"),
    "later questions": lambda cell: _with_interval(cell["later"], ".1%"),
    **{name: partial(_count, name=name) for name in ("first", "second", "third")},
}
"""Right answers: shares with their intervals, and counts by question."""


def markdown(results: Mapping[str, Any]) -> str:
    """One table a context length, methods by KL, or by right answers.

    Args:
        results: content of a result file.
    """
    parts = []
    for context in sorted({cell["context"] for cell in results["cells"]}):
        cells = [cell for cell in results["cells"] if cell["context"] == context]
        windows = results["settings"]["windows"]
        if "perplexity_full" in cells[0]:
            columns, worth = PROSE, _by_kl
            full = cells[0]["perplexity_full"]["mean"]
            title = f"{windows} windows, perplexity of the dense cache {full:.2f}"
        elif "later" in cells[0]:
            columns, worth, title = QUESTIONS, _by_answers, f"{windows} contexts of three keys"
        else:
            columns, worth, title = ALBUMS, _by_kl, f"{windows} albums"
        rows = sorted(cells, key=worth)
        lines = [_line(columns), _line("---" for _ in columns).replace(" ", "")]
        lines += [_line(column(cell) for column in columns.values()) for cell in rows]
        parts.append(f"Context {context:,} tokens, {title}:\n\n" + "\n".join(lines))
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


def _by_kl(cell: Cell) -> float:
    return cell["kl"]["mean"]


def _by_answers(cell: Cell) -> float:
    return -sum(sum(cell["by_window"][name]) for name in ("first", "second", "third"))


def _line(entries: Iterable[str]) -> str:
    return f"| {' | '.join(entries)} |"


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
