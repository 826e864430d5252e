"""Measured time of packed attention by option, beside the quality of codes with that option.

    python -m benchmarks.quality.times benchmarks/results/options-h200.json

Two measurements are joined that have nothing but the option in common. Times are those of
``benchmarks/options_gpu.py``: one step of one layer at Qwen2.5-7B's shape, random codes of about
the bytes of ratio 8, over the fastest dense attention of the same file. Quality is that of other
models at ratio 8, codes fitted beforehand: SmolLM2 on prose of 3,072 tokens and asked several
questions, the small vision-language model on albums of 4,096 tokens. What was not measured is left
out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..figure import pyplot, save
from ..plots_gpu import dense_bytes
from .beside import CONTEXT
from .metrics import Figure, share
from .results import FOLDER
from .table import DOCS, embed

Cell = Mapping[str, Any]

BRIEF, LONG = "B1 28/4 S4096", "B8 28/4 S32768"

RATIO = 8

RUNS = {
    "prose": ("quality-3072.json", 3072),
    "questions": ("quality-questions.json", 2048),
    "albums": ("quality-images.json", CONTEXT),
}
"""Result file of each run, and the tokens of its contexts."""

ASKED = {
    "questions": {"first": 1, "second": 1, "third": 1},
    "albums": {"which": 2, "what": 2, "needle": 1, "read": 1},
}
"""Questions about each context."""

SETTING = frozenset({"inner", "sinks", "window", "profile_cache", "block"})
"""Options that all cells of a run have in common."""

NEAREST = {"visual_ratio=16, text_ratio=4.5": ("visual_ratio=16", "text_ratio=2")}
"""Options whose quality was measured with another budget than their time: as cells have them, and
what differs. They are shown, but are not part of a front."""

DENSE = "dense, full precision"

HEAD = (
    "| option | time: B1, S 4,096 | B8, S 32,768 | ratio of that | prose: KL | top-1 "
    "| questions | albums: ratio | KL | right |\n" + "|---" * 10 + "|"
)


@dataclass(frozen=True)
class Row:
    """An option that was timed.

    Attributes:
        option: its name in the file of times.
        times: over dense attention, by shape.
        ratio: 16-bit bytes over those of the layer that was timed, at the long shape if it was.
        cells: what is known of its quality, by run.
        other: the budget that its quality has, where that is not what was timed.
    """

    option: str
    times: Mapping[str, float]
    ratio: float | None
    cells: Mapping[str, Cell]
    other: str = ""


def options_of(cell: Cell) -> frozenset[str]:
    """Options of a cell of ours as the file of times has them, common ones and ratio 8 aside."""
    return frozenset(
        f"{name}={value!r}"
        for name, value in cell["options"].items()
        if name not in SETTING and (name, value) != ("ratio", RATIO)
    )


def join(times: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Options that were timed with kernels, the fastest first, and what is known of them.

    Args:
        times: content of a file of ``options_gpu.py``.
        runs: contents of result files by run; some may be left out.

    Returns:
        Dense attention is one of the rows: time 1.
    """
    shapes = times["shapes"]
    names = dict.fromkeys(name for shape in shapes.values() for name in shape["megabytes"])
    known = {
        run: [c for c in content["cells"] if c["context"] == RUNS[run][1]]
        for run, content in runs.items()
    }
    full = {
        run: cell for run, cells in known.items() for cell in cells
        if cell["method"] == "full precision"
    }  # fmt: skip
    rows = [Row(DENSE, dict.fromkeys(shapes, 1.0), 1.0, full)]
    for name in names:
        nearest, other = NEAREST.get(name, (name, ""))
        wanted = frozenset() if nearest == "none" else frozenset(nearest.split(", "))
        cells = {
            run: cell for run, some in known.items() for cell in some
            if cell.get("fitted") == "beforehand" and options_of(cell) == wanted
        }  # fmt: skip
        over = {
            shape: found["microseconds"][name] / found["microseconds"]["dense"]
            for shape, found in shapes.items()
            if name in found["microseconds"]
        }
        stored = shapes.get(LONG, {}).get("megabytes", {}).get(name)
        ratio = None if stored is None else dense_bytes(LONG) / 1e6 / stored
        rows.append(Row(name, over, ratio, cells, other))
    return sorted(rows, key=lambda row: (row.times.get(LONG, float("inf")), row.option))


def right(run: str, cell: Cell) -> list[float]:
    """Of each context, the share of its questions that were answered."""
    asked = ASKED[run]
    counts = [[int(count) for count in cell["by_window"][kind]] for kind in asked]
    return [sum(those) / sum(asked.values()) for those in zip(*counts, strict=True)]


def gained(run: str, cell: Cell, full: Cell) -> Figure:
    """Share of right answers less that of the dense cache on the same contexts."""
    pairs = torch.tensor([right(run, cell), right(run, full)], dtype=torch.float64)
    return share(pairs[0] - pairs[1], -1.0)


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (time, loss), those that no other one beats in both, by time."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def _figure(name: str) -> Callable[[Row, Row], Figure | None]:
    def of(row: Row, _: Row) -> Figure | None:
        cell = row.cells.get("prose")
        return Figure(**cell[name]) if cell else None

    return of


def _points(run: str) -> Callable[[Row, Row], Figure | None]:
    def of(row: Row, full: Row) -> Figure | None:
        if run not in row.cells or run not in full.cells:
            return None
        if row is full:
            return Figure(0.0, 0.0, 0.0)
        figure = gained(run, row.cells[run], full.cells[run])
        return Figure(100 * figure.mean, 100 * figure.low, 100 * figure.high)

    return of


GAIN = "right answers, points more than dense"

PANELS: Mapping[str, tuple[str, int, Callable[[Row, Row], Figure | None]]] = {
    "SmolLM2, prose of 3,072 tokens": ("KL(full || coded), nats", 1, _figure("kl")),
    "the same, top-1": ("top-1", -1, _figure("top1")),
    "SmolLM2, three questions, 2,048 tokens": (GAIN, -1, _points("questions")),
    "small VLM, albums of 4,096 tokens": (GAIN, -1, _points("albums")),
}
"""By title: the label of what is shown over time, 1 where less of it is better, and what it is."""


def markdown(rows: Sequence[Row]) -> str:
    """One row an option.

    Args:
        rows: of :func:`join`.
    """
    full = next(row for row in rows if row.option == DENSE)
    lines = [HEAD]
    for row in rows:
        prose, albums = row.cells.get("prose"), row.cells.get("albums")
        option = row.option if row.option == DENSE else f"`{row.option}`"
        entries = [
            f"{option} (quality: `{row.other}`)" if row.other else option,
            *(_entry(row.times.get(shape), ".2f") for shape in (BRIEF, LONG)),
            _entry(row.ratio, ".1f"),
            _entry(prose["kl"]["mean"] if prose else None, ".2g"),
            _entry(prose["top1"]["mean"] if prose else None, ".1%"),
            _answers("questions", row, full),
            _entry(albums["ratio"] if albums else None, ".1f"),
            _entry(albums["kl"]["mean"] if albums else None, ".2g"),
            _answers("albums", row, full),
        ]
        lines.append(f"| {' | '.join(entries)} |")
    return "\n".join(lines)


def _entry(value: float | None, form: str) -> str:
    return "not measured" if value is None else format(value, form)


def _answers(run: str, row: Row, full: Row) -> str:
    cell = row.cells.get(run)
    if cell is None:
        return _entry(None, "")
    answered = right(run, cell)
    text = f"{sum(answered) / len(answered):.1%}"
    lead = _points(run)(row, full)
    if row is full or lead is None:
        return text
    mean, low, high = (f"{round(x, 1) + 0.0:+.1f}" for x in (lead.mean, lead.low, lead.high))
    return f"{text} ({mean}; {low} to {high})"


def plot(rows: Sequence[Row], device: str, path: Path) -> bool:
    """Write the plots of time at the long shape; False if matplotlib is not installed.

    Args:
        rows: of :func:`join`.
        device: that was timed.
        path: of the picture, its format by the suffix.
    """
    plots = pyplot()
    if plots is None:
        return False
    timed = [row for row in rows if LONG in row.times]
    full = next(row for row in rows if row.option == DENSE)
    figure, axes = plots.subplots(2, 2, figsize=(11, 9), sharex=True, layout="constrained")
    handles: dict[str, Any] = {}
    for axis, (title, (label, sign, value)) in zip(axes.flat, PANELS.items(), strict=True):
        found = {row.option: value(row, full) for row in timed}
        codes = [
            (row.times[LONG], sign * shown.mean) for row in timed
            if row is not full and not row.other and (shown := found[row.option]) is not None
        ]  # fmt: skip
        line = front(codes)
        (handles["Pareto front of codes"],) = axis.plot(
            [time for time, _ in line], [sign * loss for _, loss in line],
            color="0.6", linewidth=5, alpha=0.5, zorder=0,
        )  # fmt: skip
        for number, row in enumerate(timed):
            shown = found[row.option]
            if shown is not None:
                note = f"\n(quality: {row.other})" if row.other else ""
                handles[row.option + note] = _draw(axis, row, shown, number)
        axis.set(title=title, ylabel=label)
        axis.grid(True, alpha=0.2)
    for axis in axes[-1]:
        axis.set_xlabel("time over dense attention, B 8, S 32,768")
    figure.suptitle(f"Packed attention of one layer, measured: {device}; quality of other models")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)
    plots.close(figure)
    return True


def _draw(axis: Any, row: Row, shown: Figure, number: int) -> Any:
    style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "os^Dv<>pP"[number % 9]}
    if row.option == DENSE:
        style = {"color": "black", "marker": "*", "markersize": 12}
    return axis.errorbar(
        [row.times[LONG]], [shown.mean],
        yerr=[[max(shown.mean - shown.low, 0)], [max(shown.high - shown.mean, 0)]],
        markerfacecolor="white" if row.other else None, linestyle="none", capsize=2, **style,
    )  # fmt: skip


def main() -> None:
    """Join, print, plot, and put the table into the documentation where that has a place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "times", type=Path, nargs="?", default=FOLDER / "options-h200.json",
        help="a file of benchmarks/options_gpu.py",
    )  # fmt: skip
    parser.add_argument("--picture", type=Path, help="beside that file, if it is not given")
    args = parser.parse_args()
    times = json.loads(args.times.read_text(encoding="utf-8"))
    runs = {
        run: json.loads((FOLDER / name).read_text(encoding="utf-8"))
        for run, (name, _) in RUNS.items()
    }
    rows = join(times, runs)
    name = f"{args.times.stem}-quality"
    text = markdown(rows)
    print(text)
    document = DOCS.read_text(encoding="utf-8") if DOCS.exists() else ""
    if f"<!-- results: {name} -->" in document:
        DOCS.write_text(embed(document, name, text), encoding="utf-8")
        print(f"\nwrote {DOCS}")
    picture = args.picture or args.times.with_name(f"{name}.svg")
    if plot(rows, times["device"], picture):
        print(f"wrote {picture}")
    else:
        print("no plot: matplotlib is not installed (pip install -e '.[bench]')")


if __name__ == "__main__":
    main()
