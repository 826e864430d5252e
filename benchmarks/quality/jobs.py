"""Several processes: most of a cell is a processor's work. They take turns with the devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .results import alike, key_of, write

OWN_BYTES = 3 << 30
"""Memory of a GPU that a process takes for itself: context, weights, logits."""

TOKEN_BYTES = 2 << 20
"""The same for each token of the longest context: a fit keeps what gradients want. (A fit of 4,096
tokens of SmolLM2 in float32 was measured to take at most 9 GB.) Where memory is short, sensitivity
is not measured, and the codes are others than they are elsewhere."""

SCORE_BYTES = 8
"""Scores and weights of a head for two tokens: in float32, attention with grouped heads keeps those
of a whole prefill. (Eight windows of 7,680 tokens were seen to take 42 GB.)"""


class Claims:
    """Which process measures what: the first that asks.

    Args:
        folder: that all processes have in common; None: there is one process.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.own: set[str] = set()

    def take(self, unit: str) -> bool:
        """Whether this process measures ``unit``, from now on if nobody else does."""
        if self.folder is None or unit in self.own:
            return True
        try:
            (self.folder / unit.replace("/", " ")).touch(exist_ok=False)
        except FileExistsError:
            return False
        self.own.add(unit)
        return True


def jobs_that_fit(longest: int, rows: int = 0) -> int:
    """Processes that the GPUs have memory for, at most one for every two processors.

    Args:
        longest: tokens of the longest context.
        rows: heads of all windows that are prefilled together; 0 if attention keeps no scores.
    """
    wanted = OWN_BYTES + TOKEN_BYTES * longest + SCORE_BYTES * rows * longest**2
    free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    return max(min(sum(each // wanted for each in free), (os.cpu_count() or 2) // 2), 1)


def part_of(path: Path, number: int) -> Path:
    """The result file of one process."""
    return path.with_suffix(f".{number}.json")


def device_of(number: int) -> dict[str, str]:
    """The variable that gives a process one of several GPUs."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": names[number % len(names)]} if len(names) > 1 else {}


def numbers_of(path: Path) -> list[int]:
    """Numbers of the processes whose result files are there."""
    names = (p.stem.removeprefix(f"{path.stem}.") for p in path.parent.glob(f"{path.stem}.*.json"))
    return sorted(int(name) for name in names if name.isdecimal())


def files_of(path: Path) -> list[Path]:
    """The common result file, and those of single processes that are there, the oldest first."""
    return [path, *(part_of(path, number) for number in numbers_of(path))]


def run_jobs(arguments: Sequence[str], count: int, path: Path, minutes: float | None) -> bool:
    """Run the benchmark in ``count`` processes; each goes on from what is there.

    That is the common result file, and the files of processes of an earlier run that was stopped
    as a whole. A process knows its settings, and takes what was measured with the same ones. What
    it has and measures goes to a file of its own: a process that has nothing new has none, and no
    older file is written to.

    Args:
        arguments: of the command line, for every process.
        count: processes.
        path: the common result file; what the processes measure is merged into it.
        minutes: after which processes are stopped, in the middle of a cell if need be.

    Returns:
        Whether all of them measured everything.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // count, 1)),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # processes share the memory
    }
    first = max(numbers_of(path), default=-1) + 1
    parts = [part_of(path, first + number) for number in range(count)]
    with tempfile.TemporaryDirectory() as claims:
        processes = []
        for number, part in enumerate(parts):
            words = [*arguments, "--claims", claims, "--common", str(path), "--output", str(part)]
            program = [sys.executable, "-m", "benchmarks.quality", *words]
            processes.append(subprocess.Popen(program, env={**environment, **device_of(number)}))
        codes = [_wait(process, end) for process in processes]
    merge(parts, path, " ".join(arguments))
    return not any(codes)


def _wait(process: subprocess.Popen[bytes], end: float | None) -> int:
    try:
        return process.wait(None if end is None else max(end - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        print("time is up: the same command again goes on", flush=True)
        return 1


def merge(parts: Sequence[Path], path: Path, command: str) -> None:
    """Every cell of the files of one run once, in the common file.

    It is as if one process had run: each has gone on from the common file, so that what that has
    besides is of other settings, versions or sources.

    Args:
        parts: those that are there have the same settings and versions; others stay where they are.
        path: of the common file; without any part it stays as it is.
        command: that made it.
    """
    contents = [_read(part) for part in parts if part.exists()]
    if contents:
        first = contents[0]
        same = [content for content in contents if alike(content, first)]
        cells = {key_of(cell): cell for content in same for cell in content["cells"]}
        about = {"command": f"python -m benchmarks.quality {command}"}
        write(path, {**first, **about, "cells": list(cells.values())})
    clear(path)


def clear(path: Path) -> None:
    """Remove the files of single processes whose cells the common file has, all of them."""
    if not path.exists():
        return
    common = _read(path)
    there = {key_of(cell) for cell in common["cells"]}
    for part in files_of(path)[1:]:
        content = _read(part)
        if alike(content, common) and {key_of(cell) for cell in content["cells"]} <= there:
            part.unlink()
        else:
            print(f"{part} stays: it has cells or settings that {path.name} has not", flush=True)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
