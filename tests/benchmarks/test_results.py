from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality.plot import plot
from benchmarks.quality.results import Results, environment, rounded
from benchmarks.quality.table import best, embed, markdown

SETTINGS = {"windows": 2}
HERE = environment(torch.device("cpu"))


def cell(method: str, ratio: float, kl: float, context: int = 2048) -> dict[str, Any]:
    def figure(value: float) -> dict[str, float]:
        return {"mean": value, "low": 0.9 * value, "high": 1.1 * value}

    return {
        "method": method,
        "family": method.partition(" ")[0],
        "context": context,
        "ratio": ratio,
        "whole_ratio": 0.8 * ratio,
        "token_bytes": 23_040 / ratio,
        "model_bytes": 0,
        "kl": figure(kl),
        "top1": figure(0.96),
        "perplexity": figure(15),
        "perplexity_full": figure(14.25),
        "greedy": figure(30),
        "passkeys": figure(0.5),
        "by_window": {"passkeys": [1.0, 0.0]},
    }


def results(path: Path, *cells: dict[str, Any], **changes: Any) -> Results:
    made = Results.resume(path, {**SETTINGS, **changes}, HERE, "command")
    for one in cells:
        made.add(one)
    return made


def test_cells_are_there_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "quality.json"
    results(path, cell("A", 4, 1 / 3), cell("B", 8, 0.2))
    again = results(path)
    assert len(again.cells) == 2 and again.has("A", 2048) and again.has("B", 2048)
    assert not again.has("A", 4096) and not again.has("C", 2048)
    content = json.loads(path.read_text())
    assert content["cells"][0]["kl"]["mean"] == 0.333333
    assert content["environment"]["torch"] == torch.__version__
    assert [p.name for p in path.parent.iterdir()] == ["quality.json"]


def test_cells_of_other_settings_or_versions_are_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "quality.json"
    results(path, cell("A", 4, 0.1))
    assert results(path, windows=3).cells == []
    assert "quality.json was measured with other settings" in capsys.readouterr().out
    other = Results.resume(path, SETTINGS, {**HERE, "torch": "2.0"}, "command")
    assert other.cells == []


def test_cells_of_another_device_are_kept_and_named(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    results(path, cell("A", 4, 0.1))
    content = json.loads(path.read_text())
    del content["cells"][0]["device"]  # as files were at first
    content["environment"]["device"] = "GPU of old"
    path.write_text(json.dumps(content))
    results(path, cell("B", 8, 0.2))
    content = json.loads(path.read_text())
    assert [c["device"] for c in content["cells"]] == ["GPU of old", HERE["device"]]
    assert f"on GPU of old and {HERE['device']}; torch" in markdown(content)


def test_the_table_says_which_sources_made_cells(tmp_path: Path) -> None:
    cells = [{**cell(n, 4, 0.1), "sources": s} for n, s in (("A", "x"), ("B", "y"), ("C", "y"))]
    made = results(tmp_path / "q.json", *cells)
    text = markdown(json.loads(made.path.read_text()))
    assert text.endswith("Cells of ours by digest of the sources that made them: y (2), x (1).")


def test_cells_of_other_sources_are_measured_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = results(
        tmp_path / "q.json",
        cell("rival", 4, 0.1), {**cell("old", 4, 0.1), "sources": "a"},
        {**cell("new", 4, 0.1), "sources": "b"},
    )  # fmt: skip
    made.drop_outdated("b")
    assert [c["method"] for c in made.cells] == ["rival", "new"]
    assert capsys.readouterr().out.startswith("1 cells are of other sources")
    made.drop_outdated("b")
    assert len(made.cells) == 2 and not capsys.readouterr().out


def test_rounding_goes_all_through() -> None:
    value = {"a": [1 / 3, (2 / 3, 5)], "b": "text", "c": 1e-9 / 3}
    assert rounded(value) == {"a": [0.333333, [0.666667, 5]], "b": "text", "c": 3.33333e-10}


def test_the_table_sorts_methods_by_kl_within_a_context(tmp_path: Path) -> None:
    made = results(
        tmp_path / "q.json",
        cell("A", 4, 0.1), cell("B", 8.001, 0.02), cell("A", 4, 0.3, context=4096),
    )  # fmt: skip
    text = markdown(json.loads(made.path.read_text()))
    first, second = text.split("Context 4,096 tokens")
    rows = [line for line in first.splitlines() if line.startswith(("| A", "| B"))]
    assert rows[0] == (
        "| B | 8.00 | 6.40 | 0.02 (0.018 to 0.022) | 96.0% (86.4% to 105.6%) | 15.00 | 30 "
        "| 1 of 2 |"
    )
    assert rows[1].startswith("| A | 4.00") and len(rows) == 2
    assert "Context 2,048 tokens, 2 windows, perplexity of the dense cache 14.25" in first
    assert second.count("| A | 4.00") == 1
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {9}


def test_the_front_has_what_nothing_beats() -> None:
    cells = [
        cell("worse", 4, 0.5), cell("good", 4, 0.1), cell("better", 8, 0.3),
        cell("beaten", 6, 0.35), cell("tied", 8, 0.4), cell("far", 12, 0.9),
    ]  # fmt: skip
    assert [c["method"] for c in best(cells)] == ["good", "better", "far"]


def test_embedding_replaces_what_is_between_the_marks() -> None:
    document = "a\n<!-- results: x -->\nold\n<!-- end: x -->\nb\n"
    once = embed(document, "x", "new")
    assert once == "a\n<!-- results: x -->\n\nnew\n\n<!-- end: x -->\nb\n"
    assert embed(once, "x", "new") == once
    with pytest.raises(ValueError, match="results: y"):
        embed(document, "y", "new")


def test_the_plot_is_written_and_always_the_same(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    content = {"cells": [cell("A", 4, 0.1), cell("B", 8, 0.02), cell("A", 4, 0.3, 4096)]}
    assert plot(content, tmp_path / "1.svg") and plot(content, tmp_path / "2.svg")
    first = (tmp_path / "1.svg").read_text()
    assert first == (tmp_path / "2.svg").read_text()
    for words in ("2,048 tokens of context", "4,096 tokens of context", "Pareto front"):
        assert words in first


def test_without_matplotlib_there_is_no_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert not plot({"cells": []}, tmp_path / "1.svg")
    assert not list(tmp_path.iterdir())
