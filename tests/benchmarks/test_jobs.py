from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import jobs
from benchmarks.quality.methods import METHODS


def cell(method: str, context: int, kl: float) -> dict[str, Any]:
    return {"method": method, "context": context, "kl": kl}


@pytest.mark.parametrize("count", [2, 3, 8])
def test_every_method_is_in_one_share(count: int) -> None:
    shares = [jobs.share(METHODS, number, count) for number in range(count)]
    names = [m.name for methods in shares for m in methods]
    assert sorted(names) == sorted(m.name for m in METHODS)
    rivals = max(count // 4, 1)
    assert not any(m.ours for methods in shares[:rivals] for m in methods)
    for part in (shares[:rivals], shares[rivals:]):
        sizes = [len(methods) for methods in part]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("number", "count"), [(0, 1), (2, 2), (-1, 2)])
def test_shares_that_are_not_there_are_refused(number: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"share {number} of {count}: accepted are 0 of 2"):
        jobs.share(METHODS, number, count)


def test_merging_keeps_every_cell_once_and_removes_the_parts(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    old = cell("A", 1, 0.5)
    for number, own in enumerate(([cell("B", 1, 0.1)], [cell("C", 1, 0.2), cell("C", 2, 0.3)])):
        content = {"command": "x", "settings": {"windows": 2}, "cells": [old, *own]}
        jobs.part_of(path, number).write_text(json.dumps(content))
    jobs.merge([jobs.part_of(path, n) for n in range(3)], path, "--full --jobs 3")
    content = json.loads(path.read_text())
    assert content["cells"] == [old, cell("B", 1, 0.1), cell("C", 1, 0.2), cell("C", 2, 0.3)]
    assert content["settings"] == {"windows": 2}
    assert content["command"] == "python -m benchmarks.quality --full --jobs 3"
    assert [p.name for p in tmp_path.iterdir()] == ["q.json"]


def test_processes_share_the_work_and_go_on_from_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps({"command": "x", "cells": [cell("A", 1, 0.5)]}))
    started: list[list[str]] = []

    class Process:
        def __init__(self, words: list[str], env: dict[str, str]) -> None:
            assert int(env["OMP_NUM_THREADS"]) >= 1
            started.append(words)
            self.number = int(words[words.index("--share") + 1])
            part = Path(words[words.index("--output") + 1])
            content = json.loads(part.read_text())
            content["cells"].append(cell(f"job {self.number}", 1, 0.1))
            part.write_text(json.dumps(content))

        def wait(self) -> int:
            return int(self.number == 1)

    monkeypatch.setattr(jobs.subprocess, "Popen", Process)
    assert not jobs.run_jobs(["--full"], 2, path)
    assert [words[1:4] for words in started] == [["-m", "benchmarks.quality", "--full"]] * 2
    cells = json.loads(path.read_text())["cells"]
    assert [c["method"] for c in cells] == ["A", "job 0", "job 1"]


def test_processes_take_turns_with_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(jobs.torch.cuda, "device_count", lambda: 2)
    assert [jobs.device_of(i)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert jobs.device_of(1) == {"CUDA_VISIBLE_DEVICES": "5"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert jobs.device_of(1) == {}


def test_nothing_measured_leaves_no_file(tmp_path: Path) -> None:
    jobs.merge([tmp_path / "q.0.json"], tmp_path / "q.json", "")
    assert not list(tmp_path.iterdir())
