"""The scores of the model's card, out of the file that ``evaluate.py`` wrote.

python -m benchmarks.tiny_vlm.card
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..quality.results import FOLDER
from ..quality.table import embed

CARD = Path(__file__).resolve().parent / "CARD.md"


def scores(content: Mapping[str, Any]) -> str:
    """Markdown: exact matches by task and length with their controls, and the gates.

    Args:
        content: of the result file.
    """
    lines = [
        "| task | context | right | half of the cache forgotten | blank images |",
        "|---|---|---|---|---|",
    ]
    for cell in content["cells"]:
        columns = [_share(cell.get(name)) for name in ("exact", "half", "blank")]
        lines.append(f"| {cell['task']} | {cell['context']:,} | {' | '.join(columns)} |")
    missed = [gate for gate, held in content["gates"].items() if not held]
    gates = "; ".join(missed) if missed else "none"
    about, settings = content["environment"], content["settings"]
    ratio = content["perplexity over SmolLM2's"]
    return "\n".join([
        f"Exact match of answers, greedy, {settings['contexts']} contexts a cell, 95 % intervals "
        f"in brackets. The adapter's SHA-256 starts with `{settings['adapter']}`.", "", *lines, "",
        f"Perplexity of prose over SmolLM2's: {ratio:.3f}. "
        f"Of {len(content['gates'])} gates missed: {gates}.", "",
        f"`{content['command']}` on {about['device']}; torch {about['torch']}, transformers "
        f"{about['transformers']}.",
    ])  # fmt: skip


def _share(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return ""
    return f"{figure['mean']:.1%} ({figure['low']:.1%} to {figure['high']:.1%})"


def main() -> None:
    """Put them into the card."""
    content = json.loads((FOLDER / "tiny-vlm.json").read_text(encoding="utf-8"))
    card = CARD.read_text(encoding="utf-8")
    CARD.write_text(embed(card, "tiny-vlm", scores(content)), encoding="utf-8")


if __name__ == "__main__":
    main()
