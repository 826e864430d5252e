from __future__ import annotations

from typing import Any

from benchmarks.quality import beside
from benchmarks.quality.methods import METHODS


def figure(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean, "high": mean}


def prose(method: str) -> dict[str, Any]:
    return {
        "method": method, "context": 2048, "ratio": 7.2917, "kl": figure(0.01234),
        "top1": figure(0.955), "by_window": {"passkeys": [1.0, 0.0, 1.0]},
    }  # fmt: skip


def test_every_method_named_is_one_of_the_run() -> None:
    runs = {m.name: m.runs for m in METHODS}
    rows = [row for _, some in beside.ABLATIONS for row in some]
    wanted = {method for _, _, method in rows if method}
    assert wanted <= {name for name, own in runs.items() if "paper" in own}
    assert {m.name for m in METHODS if m.name.startswith("paper: ")} <= wanted
    assert {m for _, _, m in beside.TABLE_1 if m} <= {n for n, o in runs.items() if "images" in o}


def test_what_is_measured_stands_beside_the_papers_figures() -> None:
    text = beside.ablations({"cells": [prose("paper: K 48, V 48"), prose("quince")]})
    line = "| 64/64; here 48/48 | 76.88, 52.44 (5.09x) | 7.29 | 0.012 | 95.5% | 2 of 3 |"
    assert text.splitlines().count(line) == 1
    assert "| by head, 24/24 | not reported | not measured |  |  |  |" in text.splitlines()
    assert "| 128/256 | 76.77, 52.50 (2.32x) | not here |  |  |  |" in text.splitlines()
    assert "quince" not in text
    for title, _ in beside.ABLATIONS:
        assert text.count(f"{title}:\n\n| | paper") == 1


def test_albums_of_one_length_stand_beside_table_1() -> None:
    tasks = {kind: figure(0.5) for kind in ("which", "what", "needle", "read")}
    cells = [
        {"method": "H2O 2x", "context": context, "ratio": ratio, **tasks}
        for context, ratio in ((4096, 2.0), (8000, 3.0))
    ]
    rows = beside.table_1({"cells": cells}).splitlines()
    assert rows[5] == (
        "| H2O, 50 % | 2x: 76.36, 52.09, 32.15 | 2.00 | 50.0% | 50.0% | 50.0% | 50.0% |"
    )
    assert "3.00" not in "".join(rows)
    assert rows[2].endswith("| not measured |  |  |  |  |")
    assert {row.count("|") for row in rows} == {8}
