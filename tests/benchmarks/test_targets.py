from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.quality import publish
from benchmarks.quality.methods import METHODS
from benchmarks.quality.results import FOLDER
from benchmarks.quality.targets import BEST, FITS, SEEN, TARGETS, markdown


def cell(name: str, kl: float, top1: float, keys: int) -> dict[str, Any]:
    hits = [1.0] * keys + [0.0] * (3 - keys)
    return {
        "method": name, "kl": {"mean": kl}, "top1": {"mean": top1},
        "by_window": {"passkeys": hits},
    }  # fmt: skip


CELLS = [
    cell("full precision", 0, 1, 3),
    cell("attentionpack 4x", 0.0015, 0.98, 3),
    cell("attentionpack 4x, pre-RoPE K", 0.0009, 0.985, 3),
    cell("attentionpack 8x", 0.0101, 0.99, 3),
    cell("attentionpack 8x, fitted beforehand", 0.0099, 0.97, 2),
    cell("attentionpack 8x, pre-RoPE K, fitted beforehand", 0.0061, 0.959, 3),
]


def rows(cells: list[dict[str, Any]]) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in markdown({"cells": cells}).splitlines()]
    return {line[0]: line[1:] for line in lines[2:]}


def test_every_target_is_judged_at_its_limit() -> None:
    found = rows(CELLS)
    assert len(found) == 3 * len(TARGETS) + 3
    missing = "not measured"
    assert found["4x: KL, keys as attention sees them"] == [
        "at most 0.0015", missing, "0.0015, met",
    ]  # fmt: skip
    assert found["4x: KL, best variant"] == ["at most 0.0008", missing, "**0.0009, missed**"]
    assert found["4x: top-1, best variant"] == ["at least 98.5%", missing, "98.5%, met"]
    assert found["6x: KL, best variant"] == ["at most 0.003", missing, missing]
    assert found["8x: KL, keys as attention sees them"][1:] == [
        "0.0099, met", "**0.01, missed**",
    ]  # fmt: skip
    assert found["8x: KL, best variant"][1:] == ["**0.0061, missed**", missing]
    assert found["8x: top-1, best variant"][1:] == ["97.0%, met", "99.0%, met"]
    assert found["8x: pass keys, keys as attention sees them"] == [
        "3 of 3", "**2 of 3, missed**", "3 of 3, met",
    ]  # fmt: skip
    assert found["8x: pass keys, before rotation"][1:] == ["3 of 3, met", missing]
    assert found["default ratio, keys as attention sees them"][1:] == ["none measured", "4"]


def test_without_the_dense_cache_there_is_nothing_to_find_keys_like() -> None:
    assert len(rows(CELLS[1:])) == 3 * len(TARGETS) + 1


def test_the_names_are_those_of_methods() -> None:
    names = {m.name for m in METHODS if "target" in m.runs}
    wanted = {f"attentionpack {t[0]}x{v}{f}" for t in TARGETS for v in (SEEN, BEST) for f in FITS}
    assert wanted <= names


def test_documentation_gets_both_tables(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "quality-3072.json"
    path.write_text((FOLDER / "quality-3072.json").read_text(encoding="utf-8"))
    marks = [f"<!-- results: {n} -->\n<!-- end: {n} -->\n" for n in ("t", "t-targets")]
    docs = tmp_path / "docs.md"
    docs.write_text("".join(marks))
    monkeypatch.setattr(publish, "DOCS", docs)
    publish.publish(path, "t")
    text = docs.read_text()
    tables = json.loads(path.read_text())
    assert text.count(markdown(tables)) == 1 and text.count("Context 3,072 tokens") == 1
