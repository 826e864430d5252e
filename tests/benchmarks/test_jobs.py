from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks.quality import jobs
from benchmarks.quality.results import Results

HERE = {"device": "GPU", "torch": "2.13", "transformers": "5"}


def cell(method: str, context: int, kl: float, **more: Any) -> dict[str, Any]:
    return {"method": method, "context": context, "kl": kl, **more}


def file(
    path: Path, *cells: dict[str, Any], settings: Any = 1, torch: str = HERE["torch"]
) -> None:  # fmt: skip
    about = {"command": "x", "environment": {**HERE, "torch": torch}, "settings": settings}
    path.write_text(json.dumps({**about, "cells": cells}))


def methods(path: Path) -> list[str]:
    return [c["method"] for c in json.loads(path.read_text())["cells"]]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_what_one_process_claims_is_no_other_ones(tmp_path: Path) -> None:
    one, other = jobs.Claims(tmp_path), jobs.Claims(tmp_path)
    assert one.take("rivals, 2048 tokens") and one.take("rivals, 2048 tokens")
    assert not other.take("rivals, 2048 tokens")
    assert other.take("truncated SVD 8x (the paper) / x")
    assert not one.take("truncated SVD 8x (the paper) / x")
    alone = jobs.Claims(None)
    assert alone.take("rivals, 2048 tokens")


@pytest.mark.parametrize(
    ("free", "cores", "longest", "rows", "count"),
    [
        ([79 << 30], 16, 7680, 0, 4),  # 18 GiB each
        ([79 << 30], 16, 3072, 0, 8),  # 9 GiB each, but two processors for each of 8
        ([79 << 30, 40 << 30], 64, 7680, 0, 6),
        ([1 << 30], 16, 7680, 0, 1),
        ([79 << 30], 16, 7680, 72, 1),  # 50 GiB each
        ([79 << 30], 64, 3072, 180, 3),  # 21.7 GiB each
    ],
)
def test_as_many_processes_as_memory_and_processors_allow(
    free: list[int],
    cores: int,
    longest: int,
    rows: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs.torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(jobs.torch.cuda, "mem_get_info", lambda i: (free[i], 80 << 30))
    monkeypatch.setattr(jobs.os, "cpu_count", lambda: cores)
    assert jobs.jobs_that_fit(longest, rows) == count


def test_merging_keeps_every_cell_once_and_removes_the_parts(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    old = cell("A", 1, 0.5)
    for number, own in enumerate(([cell("B", 1, 0.1)], [cell("C", 1, 0.2), cell("C", 2, 0.3)])):
        file(jobs.part_of(path, number), old, *own, settings={"windows": 2})
    jobs.merge([jobs.part_of(path, n) for n in range(3)], path, "--full --jobs 3")
    content = json.loads(path.read_text())
    assert content["cells"] == [old, cell("B", 1, 0.1), cell("C", 1, 0.2), cell("C", 2, 0.3)]
    assert content["settings"] == {"windows": 2}
    assert content["command"] == "python -m benchmarks.quality --full --jobs 3"
    assert names(tmp_path) == ["q.json"]


@pytest.mark.parametrize("other", [{"settings": 2}, {"torch": "2.11"}])
def test_a_part_that_is_not_merged_stays(
    tmp_path: Path, other: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: it was removed all the same; and versions were not compared."""
    path = tmp_path / "q.json"
    file(jobs.part_of(path, 0), cell("A", 1, 0.1))
    file(jobs.part_of(path, 1), cell("B", 1, 0.2), **other)
    jobs.merge([jobs.part_of(path, n) for n in range(2)], path, "")
    assert methods(path) == ["A"]
    assert names(tmp_path) == ["q.1.json", "q.json"]
    assert "q.1.json stays" in capsys.readouterr().out


class Process:
    """A process that measures one cell as ``one_job`` does; the second one fails.

    Those of ``idle`` add no cell: they had nothing left to measure, or failed before.
    """

    started: ClassVar[list[list[str]]] = []
    slow: ClassVar[int] = -1
    idle: ClassVar[tuple[int, ...]] = ()
    settings: ClassVar[Any] = 1
    sources: ClassVar[str] = "new"

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        assert int(env["OMP_NUM_THREADS"]) >= 1
        assert Path(words[words.index("--claims") + 1]).is_dir()
        part, common = (Path(words[words.index(w) + 1]) for w in ("--output", "--common"))
        self.number, self.killed = len(self.started), False
        self.started.append(words)
        files = jobs.files_of(common)
        results = Results.resume(part, self.settings, HERE, "", files)
        results.drop_outdated(self.sources)
        if self.number not in self.idle:
            results.add(cell(f"job {self.number}", 1, 0.1, sources=self.sources))

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
    for name, value in (("slow", -1), ("idle", ()), ("settings", 1), ("sources", "new")):
        monkeypatch.setattr(Process, name, value)
    monkeypatch.setattr(jobs.subprocess, "Popen", Process)
    return Process


def test_processes_share_the_work_and_go_on_from_what_is_there(
    tmp_path: Path, process: type[Process]
) -> None:
    path = tmp_path / "q.json"
    file(path, cell("A", 1, 0.5))
    assert not jobs.run_jobs(["--full"], 2, path, None)
    assert [w[1:4] for w in process.started] == [["-m", "benchmarks.quality", "--full"]] * 2
    assert len({w[w.index("--claims") + 1] for w in process.started}) == 1
    assert methods(path) == ["A", "job 0", "job 1"]
    assert names(tmp_path) == ["q.json"]


def test_processes_are_stopped_in_time_and_nothing_measured_is_lost(
    tmp_path: Path, process: type[Process], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(process, "slow", 0)
    path = tmp_path / "q.json"
    assert not jobs.run_jobs([], 1, path, 0.0)
    assert capsys.readouterr().out.count("time is up") == 1
    assert methods(path) == ["job 0"]


def test_a_process_that_adds_nothing_does_not_bring_back_other_settings(
    tmp_path: Path, process: type[Process]
) -> None:
    """Bug: its copy of the old file came first, and what the others measured was thrown away."""
    process.idle = (0,)
    path = tmp_path / "q.json"
    file(path, cell("A", 1, 0.5), settings="old adapter")
    jobs.run_jobs([], 2, path, None)
    content = json.loads(path.read_text())
    assert content["settings"] == 1 and methods(path) == ["job 1"]
    assert names(tmp_path) == ["q.json"]


def test_a_process_that_adds_nothing_does_not_bring_back_outdated_cells(
    tmp_path: Path, process: type[Process]
) -> None:
    """Bug: its copy of the old file came last, with cells that the other had measured anew."""
    process.idle = (1,)
    path = tmp_path / "q.json"
    file(path, cell("rival", 1, 0.5), cell("job 0", 1, 0.5, sources="old"))
    jobs.run_jobs([], 2, path, None)
    rival, new = json.loads(path.read_text())["cells"]
    assert rival["method"] == "rival" and (new["kl"], new["sources"]) == (0.1, "new")


def test_nothing_is_lost_where_no_process_adds_anything(
    tmp_path: Path, process: type[Process]
) -> None:
    process.idle = (0,)
    path = tmp_path / "q.json"
    file(path, cell("A", 1, 0.5), settings="old adapter")
    before = path.read_text()
    jobs.run_jobs([], 1, path, None)
    assert path.read_text() == before and names(tmp_path) == ["q.json"]


def test_what_a_run_that_was_killed_left_is_gone_on_from(
    tmp_path: Path, process: type[Process]
) -> None:
    """Bug: where its settings were newer than those of the common file, it was removed."""
    path = tmp_path / "q.json"
    file(path, cell("A", 1, 0.5), settings="old adapter")
    file(jobs.part_of(path, 0), cell("left", 1, 0.2))
    file(jobs.part_of(path, 3), cell("other", 1, 0.2), settings="another adapter")
    file(jobs.part_of(path, 4), cell("older", 1, 0.2), torch="2.11")
    before = jobs.part_of(path, 3).read_text()
    jobs.run_jobs(["--full"], 1, path, None)
    assert methods(path) == ["left", "job 0"]
    assert names(tmp_path) == ["q.3.json", "q.4.json", "q.json"]
    assert jobs.part_of(path, 3).read_text() == before


def test_a_left_file_goes_when_all_of_its_cells_are_there(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    jobs.clear(path)  # nothing yet
    file(path, cell("A", 1, 0.1), cell("B", 1, 0.1))
    file(jobs.part_of(path, 0), cell("B", 1, 0.5))
    file(jobs.part_of(path, 1), cell("B", 2, 0.5))
    (tmp_path / "q.old.json").write_text("not of a process")
    jobs.clear(path)
    assert names(tmp_path) == ["q.1.json", "q.json", "q.old.json"]


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
