"""Show what was measured: a table here and in the documentation, and a plot."""

from __future__ import annotations

import json
from pathlib import Path

from . import targets
from .plot import plot
from .table import DOCS, embed, markdown


def publish(path: Path, name: str, picture: bool = True) -> None:
    """Print the table, put it and targets into the documentation where that has places, plot.

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
    if f"<!-- results: {name}-targets -->" in document:
        parts[f"{name}-targets"] = targets.markdown(content)
    marked = {n: part for n, part in parts.items() if f"<!-- results: {n} -->" in document}
    for part_name, part in marked.items():
        document = embed(document, part_name, part)
    if marked:
        DOCS.write_text(document, encoding="utf-8")
        print(f"wrote {DOCS}")
    if not picture or "kl" not in content["cells"][0]:
        return
    if plot(content, path.with_suffix(".svg")):
        print(f"wrote {path.with_suffix('.svg')}")
    else:
        print("no plot: matplotlib is not installed (pip install -e '.[bench]')")
