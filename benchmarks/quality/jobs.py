"""Several processes: most of a cell is a processor's work. They take turns with the devices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

OWN_BYTES = 3 << 30
"""Memory of a GPU that a process takes for itself: context, weights, logits."""

TOKEN_BYTES = 2 << 20
"""The same for each token of the longest context: a fit keeps what gradients want. (A fit of 4,096
tokens of SmolLM2 in float32 was measured to take at most 9 GB.) Where memory is short, sensitivity
is not measured, and the codes are others than they are elsewhere."""


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


def jobs_that_fit(longest: int) -> int:
    """Processes that the GPUs have memory for, at most one for every two processors.

    Args:
        longest: tokens of the longest context.
    """
    wanted = OWN_BYTES + TOKEN_BYTES * longest
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


def run_jobs(arguments: Sequence[str], count: int, path: Path, minutes: float | None) -> bool:
    """Run the benchmark in ``count`` processes; each goes on from the common result file.

    Args:
        arguments: of the command line, for every process.
        count: processes.
        path: the common result file; what the processes measure is merged into it, and what those
            of an earlier run left that was stopped.
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
    if left := sorted(path.parent.glob(f"{path.stem}.*.json")):
        merge([path, *left] if path.exists() else left, path)
    with tempfile.TemporaryDirectory() as claims:
        processes = []
        for number in range(count):
            if path.exists():
                shutil.copyfile(path, part_of(path, number))
            words = [*arguments, "--claims", claims, "--output", str(part_of(path, number))]
            program = [sys.executable, "-m", "benchmarks.quality", *words]
            processes.append(subprocess.Popen(program, env={**environment, **device_of(number)}))
        codes = [_wait(process, end) for process in processes]
    merge([part_of(path, number) for number in range(count)], path, " ".join(arguments))
    return not any(codes)


def _wait(process: subprocess.Popen[bytes], end: float | None) -> int:
    try:
        return process.wait(None if end is None else max(end - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        print("time is up: the same command again goes on", flush=True)
        return 1


def merge(parts: Sequence[Path], path: Path, command: str | None = None) -> None:
    """Every cell of the part files once, in one file; the part files are gone afterwards.

    Args:
        parts: files; those with other settings than the first have nothing to add.
        path: of the one file.
        command: that made it; None: what the first part says.
    """
    contents = [json.loads(p.read_text(encoding="utf-8")) for p in parts if p.exists()]
    if not contents:
        return
    first = contents[0]
    alike = [c for c in contents if c.get("settings") == first.get("settings")]
    cells = {(c["method"], c["context"]): c for content in alike for c in content["cells"]}
    merged = {**first, "cells": list(cells.values())}
    if command is not None:
        merged["command"] = f"python -m benchmarks.quality {command}"
    path.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    for part in parts:
        if part != path:
            part.unlink(missing_ok=True)
