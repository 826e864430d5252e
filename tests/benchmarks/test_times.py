from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import times
from benchmarks.quality.methods import METHODS
from benchmarks.quality.times import BRIEF, DENSE, LONG, Row, front, gained, join, markdown, plot

COMMON = {"inner": "eager", "ratio": 8, "sinks": 4, "window": 64, "profile_cache": False}
KINDS = "visual_ratio=16, text_ratio=4.5"


def figure(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean, "high": mean}


def cell(
    run: str, kl: float, options: dict[str, Any] | None = None, hits: int = 1, **more: Any
) -> dict[str, Any]:
    """A cell of ours with some options, else the dense cache's; half of it is answered by hits."""
    own: dict[str, Any] = {"method": "full precision"}
    if options is not None:
        own = {"method": "ours", "fitted": "beforehand", "options": {**COMMON, **options}}
    asked = times.ASKED.get(run, {})
    by_window = {kind: [float(many), float(many * hits)] for kind, many in asked.items()}
    scores = {"kl": figure(kl), "top1": figure(1 - kl), "ratio": 8.0, "by_window": by_window}
    return {"context": times.RUNS[run][1], **own, **scores, **more}


def timed(**options: float) -> dict[str, Any]:
    """Times of options, of an eighth of the bytes; 2 us is that of dense attention."""
    megabytes = dict.fromkeys(options, 67.108864)
    return {"microseconds": {"dense": 2.0, **options}, "megabytes": megabytes}


def joined() -> dict[str, Row]:
    shapes = {
        BRIEF: timed(none=4.0), LONG: timed(**{
            "none": 1.0, "k_code='pre-rope', tiers=True": 5.0, "tiers=True": 3.0, "evict=0.3": 1.5,
            KINDS: 3.5,
        }),
    }  # fmt: skip
    shapes[BRIEF]["microseconds"]["evict=0.3, plain operators"] = 9.0
    runs = {
        "prose": {"cells": [
            cell("prose", 0.0),
            cell("prose", 0.5, {}, context=1),
            cell("prose", 0.5, {"ratio": 4}),
            cell("prose", 0.5, {}, fitted="first prefill"),
            cell("prose", 0.5, {"codec": "svd"}),
            cell("prose", 0.02, {}),
            cell("prose", 0.01, {"tiers": True}),
            cell("prose", 0.03, {"tiers": True, "k_code": "pre-rope"}),
        ]},
        "albums": {"cells": [
            cell("albums", 0.0),
            cell("albums", 0.04, {"ratio": 8}, hits=0),
            {**cell("albums", 0.05), "method": "ours", "fitted": "beforehand",
             "options": {"visual_ratio": 16}},
        ]},
    }  # fmt: skip
    return {row.option: row for row in join({"shapes": shapes}, runs)}


def test_options_meet_the_cells_that_have_them_and_no_others() -> None:
    rows = joined()
    kls = {
        name: {run: c["kl"]["mean"] for run, c in row.cells.items()} for name, row in rows.items()
    }  # fmt: skip
    assert kls == {
        "none": {"prose": 0.02, "albums": 0.04}, "evict=0.3": {},
        DENSE: {"prose": 0.0, "albums": 0.0}, "tiers=True": {"prose": 0.01},
        KINDS: {"albums": 0.05}, "k_code='pre-rope', tiers=True": {"prose": 0.03},
    }  # fmt: skip
    assert list(rows) == list(kls)  # the fastest first
    assert rows["none"].times == {BRIEF: 2.0, LONG: 0.5}
    assert rows["tiers=True"].times == {LONG: 1.5}
    assert rows["none"].ratio == pytest.approx(8)
    assert [row.option for row in rows.values() if row.other] == [KINDS]


def test_what_is_missing_is_said() -> None:
    none = "not measured"
    lines = markdown(list(joined().values())).splitlines()
    assert {line.count("|") for line in lines} == {11}
    entries = {cells[0]: cells[1:] for cells in (line[2:-2].split(" | ") for line in lines[2:])}
    assert entries["`evict=0.3`"] == [none, "0.75", "8.0", *[none] * 6]
    dense = ["1.00", "1.00", "1.0", "0", "100.0%", none, "8.0", "0", "100.0%"]
    assert entries[DENSE] == dense
    assert entries["`none`"][:-1] == ["2.00", "0.50", "8.0", "0.02", "98.0%", none, "8.0", "0.04"]
    assert entries["`none`"][-1].startswith("50.0% (-50.0; -100.0 to")
    assert entries[f"`{KINDS}` (quality: `text_ratio=2`)"][-2] == "0.05"


def test_answers_are_counted_as_they_are_written() -> None:
    windows = {"which": "20", "what": "21", "needle": "10", "read": "11"}
    full = {kind: "2" * 2 if many == 2 else "11" for kind, many in times.ASKED["albums"].items()}
    assert times.right("albums", {"by_window": windows}) == [1.0, pytest.approx(1 / 3)]
    lead = gained("albums", {"by_window": windows}, {"by_window": full})
    assert lead.mean == pytest.approx(-1 / 3) and lead.low == pytest.approx(-2 / 3)


def test_nothing_on_the_front_is_beaten_in_both() -> None:
    points = [(3.0, 1.0), (1.0, 4.0), (2.0, 4.0), (2.0, 3.0), (4.0, 1.0), (1.0, 5.0)]
    assert front(points) == [(1.0, 4.0), (2.0, 3.0), (3.0, 1.0)]


def test_options_that_are_timed_are_written_as_those_of_methods() -> None:
    gpu = pytest.importorskip("benchmarks.options_gpu")
    names = set(gpu.variants(*gpu.layouts(gpu.Case(1, 4, 4, 256), mixed=True)))
    assert set(times.NEAREST) <= names
    content = json.loads((times.FOLDER / times.RUNS["prose"][0]).read_text(encoding="utf-8"))
    measured = {m.name for m in METHODS}
    ours = [c for c in content["cells"] if "options" in c and c["method"] in measured]
    found = {times.options_of(c) for c in ours if c["fitted"] == "beforehand"}
    single = {name for name in names - {"none"} - set(times.NEAREST) if ", " not in name}
    assert {frozenset({name}) for name in single} | {frozenset()} <= found


def test_the_table_and_a_picture_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "quality.md"
    mark = "options-h200-quality"
    document.write_text(f"<!-- results: {mark} -->\n<!-- end: {mark} -->\n", encoding="utf-8")
    monkeypatch.setattr(times, "DOCS", document)
    picture = tmp_path / "times.svg"
    monkeypatch.setattr(sys, "argv", ["times", "--picture", str(picture)])
    times.main()
    table = document.read_text(encoding="utf-8")
    assert "| `tiers=True` |" in table and "| `tiers=True` |" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert "Packed attention of one layer" in picture.read_text(encoding="utf-8")


def test_a_run_that_is_missing_leaves_its_panel_empty(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot(list(joined().values()), "H200", tmp_path / "times.svg")
    text = (tmp_path / "times.svg").read_text(encoding="utf-8")
    assert "three questions" in text and "evict=0.3" not in text
