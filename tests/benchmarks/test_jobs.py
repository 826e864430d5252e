from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks.quality import jobs


def cell(method: str, context: int, kl: float) -> dict[str, Any]:
    return {"method": method, "context": context, "kl": kl}


def test_what_one_process_claims_is_no_other_ones(tmp_path: Path) -> None:
    one, other = jobs.Claims(tmp_path), jobs.Claims(tmp_path)
    assert one.take("rivals, 2048 tokens") and one.take("rivals, 2048 tokens")
    assert not other.take("rivals, 2048 tokens")
    assert other.take("truncated SVD 8x (the paper) / x")
    assert not one.take("truncated SVD 8x (the paper) / x")
    alone = jobs.Claims(None)
    assert alone.take("rivals, 2048 tokens")


@pytest.mark.parametrize(
    ("free", "cores", "longest", "count"),
    [
        ([79 << 30], 16, 7680, 4),  # 18 GiB each
        ([79 << 30], 16, 3072, 8),  # 9 GiB each, but two processors for each of 8
        ([79 << 30, 40 << 30], 64, 7680, 6),
        ([1 << 30], 16, 7680, 1),
    ],
)
def test_as_many_processes_as_memory_and_processors_allow(
    free: list[int], cores: int, longest: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(jobs.torch.cuda, "mem_get_info", lambda i: (free[i], 80 << 30))
    monkeypatch.setattr(jobs.os, "cpu_count", lambda: cores)
    assert jobs.jobs_that_fit(longest) == count


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


class Process:
    """A process that measures one cell; the second says that not all was measured."""

    started: ClassVar[list[list[str]]] = []
    slow: ClassVar[int] = -1

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        assert int(env["OMP_NUM_THREADS"]) >= 1
        assert Path(words[words.index("--claims") + 1]).is_dir()
        part = Path(words[words.index("--output") + 1])
        self.number, self.killed = len(self.started), False
        self.started.append(words)
        content = json.loads(part.read_text()) if part.exists() else {"cells": []}
        content["cells"].append(cell(f"job {self.number}", 1, 0.1))
        part.write_text(json.dumps(content))

    def wait(self, timeout: float | None = None) -> int:
        if self.number == self.slow and not self.killed:
            assert timeout is not None
            raise subprocess.TimeoutExpired("", timeout)
        return int(self.number == 1)

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> type[Process]:
    monkeypatch.setattr(Process, "started", [])
    monkeypatch.setattr(Process, "slow", -1)
    monkeypatch.setattr(jobs.subprocess, "Popen", Process)
    return Process


def test_processes_share_the_work_and_go_on_from_what_is_there(
    tmp_path: Path, process: type[Process]
) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps({"command": "x", "cells": [cell("A", 1, 0.5)]}))
    assert not jobs.run_jobs(["--full"], 2, path, None)
    assert [w[1:4] for w in process.started] == [["-m", "benchmarks.quality", "--full"]] * 2
    assert len({w[w.index("--claims") + 1] for w in process.started}) == 1
    cells = json.loads(path.read_text())["cells"]
    assert [c["method"] for c in cells] == ["A", "job 0", "job 1"]


def test_processes_are_stopped_in_time_and_nothing_measured_is_lost(
    tmp_path: Path, process: type[Process], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(process, "slow", 0)
    path = tmp_path / "q.json"
    assert not jobs.run_jobs([], 1, path, 0.0)
    assert capsys.readouterr().out.count("time is up") == 1
    assert [c["method"] for c in json.loads(path.read_text())["cells"]] == ["job 0"]


def test_what_a_run_that_was_killed_left_is_merged(tmp_path: Path, process: type[Process]) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps({"settings": 1, "command": "x", "cells": [cell("A", 1, 0.5)]}))
    for number, settings in enumerate((1, 2)):
        content = {"settings": settings, "cells": [cell(f"left {number}", 1, 0.2)]}
        jobs.part_of(path, number).write_text(json.dumps(content))
    jobs.run_jobs(["--full"], 1, path, None)
    content = json.loads(path.read_text())
    assert [c["method"] for c in content["cells"]] == ["A", "left 0", "job 0"]
    assert [p.name for p in tmp_path.iterdir()] == ["q.json"]


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
