"""Show what was measured: a table here and in the documentation, and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import beside, speed, targets
from .plot import plot
from .table import DOCS, embed, markdown

TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "targets": targets.markdown,
    "ablations": beside.ablations,
    "table-1": beside.table_1,
    "speed": speed.markdown,
}
"""Further tables of a result file, by the end of their place's name: those that have a place."""


def publish(path: Path, name: str, picture: bool = True) -> None:
    """Print the table, put it and others into the documentation where that has places, plot.

    Args:
        path: of the result file.
        name: of the place in the documentation.
        picture: whether there is anything to plot: several ratios.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    text = markdown(content)
    print(f"\n{text}\n\nwrote {path}")
    parts = {name: text}
    document = DOCS.read_text(encoding="utf-8") if DOCS.exists() else ""
    for kind, made in TABLES.items():
        if f"<!-- results: {name}-{kind} -->" in document:
            parts[f"{name}-{kind}"] = made(content)
    marked = {n: part for n, part in parts.items() if f"<!-- results: {n} -->" in document}
    for part_name, part in marked.items():
        document = embed(document, part_name, part)
    if marked:
        DOCS.write_text(document, encoding="utf-8")
        print(f"wrote {DOCS}")
    if not picture or "kl" not in content["cells"][0]:
        return
    pictures = {path.with_suffix(".svg"): plot}
    if f"{name}-speed" in marked:
        pictures[path.with_name(f"{path.stem}-speed.svg")] = speed.plot
    for picture_path, draw in pictures.items():
        if draw(content, picture_path):
            print(f"wrote {picture_path}")
        else:
            print("no plot: matplotlib is not installed (pip install -e '.[bench]')")
