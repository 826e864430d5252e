"""Several processes: most of a cell is a processor's work. They take turns with the devices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .methods import Method


def share(methods: Sequence[Method], number: int, count: int) -> list[Method]:
    """The methods of process ``number`` of ``count``.

    Rivals have the first quarter of the processes, as each of those holds the dense caches; ours
    the others, in turn.

    Raises:
        ValueError: there are fewer than two processes, or not so many.
    """
    if count < 2 or not 0 <= number < count:
        raise ValueError(f"share {number} of {count}: accepted are 0 of 2 and more")
    first = max(count // 4, 1)
    if number < first:
        return [m for m in methods if not m.ours][number::first]
    return [m for m in methods if m.ours][number - first :: count - first]


def part_of(path: Path, number: int) -> Path:
    """The result file of one process."""
    return path.with_suffix(f".{number}.json")


def device_of(number: int) -> dict[str, str]:
    """The variable that gives a process one of several GPUs."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": names[number % len(names)]} if len(names) > 1 else {}


def run_jobs(arguments: Sequence[str], count: int, path: Path) -> bool:
    """Run the benchmark in ``count`` processes; each goes on from the common result file.

    Args:
        arguments: of the command line, for every process.
        count: processes.
        path: the common result file; what the processes measure is merged into it.

    Returns:
        Whether all of them measured everything.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // count, 1)),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # processes share the memory
    }
    processes = []
    for number in range(count):
        if path.exists():
            shutil.copyfile(path, part_of(path, number))
        words = [*arguments, "--share", str(number), str(count)]
        words += ["--output", str(part_of(path, number))]
        program = [sys.executable, "-m", "benchmarks.quality", *words]
        processes.append(subprocess.Popen(program, env={**environment, **device_of(number)}))
    codes = [process.wait() for process in processes]
    merge([part_of(path, number) for number in range(count)], path, " ".join(arguments))
    return not any(codes)


def merge(parts: Sequence[Path], path: Path, command: str) -> None:
    """Every cell of the part files once, in one file; the part files are gone afterwards."""
    contents = [json.loads(p.read_text(encoding="utf-8")) for p in parts if p.exists()]
    if not contents:
        return
    cells = {(c["method"], c["context"]): c for content in contents for c in content["cells"]}
    merged = {
        **contents[0],
        "command": f"python -m benchmarks.quality {command}",
        "cells": list(cells.values()),
    }
    path.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    for part in parts:
        part.unlink(missing_ok=True)
