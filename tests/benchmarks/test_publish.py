from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import publish


def marks(*names: str) -> str:
    return "".join(f"<!-- results: {n} -->\n\n<!-- end: {n} -->\n" for n in names)


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A result file and a document; what is drawn is noted."""
    (tmp_path / "q.json").write_text(json.dumps({"cells": [{"kl": {}}]}))
    monkeypatch.setattr(publish, "DOCS", tmp_path / "quality.md")
    monkeypatch.setattr(publish, "markdown", lambda _: "all")
    tables = {kind: lambda _, kind=kind: f"table {kind}" for kind in publish.TABLES}
    monkeypatch.setattr(publish, "TABLES", tables)
    names: list[str] = []

    def draw(_: Any, path: Path) -> bool:
        names.append(path.name)
        return True

    monkeypatch.setattr(publish, "plot", draw)
    monkeypatch.setattr(publish.speed, "plot", draw)
    return names


def test_only_tables_that_have_a_place_are_made(tmp_path: Path, drawn: list[str]) -> None:
    document = tmp_path / "quality.md"
    document.write_text(marks("run", "run-ablations", "other-speed"))
    publish.publish(tmp_path / "q.json", "run")
    text = document.read_text()
    assert text.count("all") == text.count("table ablations") == 1
    assert "table speed" not in text and "table targets" not in text
    assert drawn == ["q.svg"]


def test_the_plot_of_times_comes_with_their_table(tmp_path: Path, drawn: list[str]) -> None:
    (tmp_path / "quality.md").write_text(marks("run-speed"))
    publish.publish(tmp_path / "q.json", "run")
    assert "table speed" in (tmp_path / "quality.md").read_text()
    assert drawn == ["q.svg", "q-speed.svg"]
