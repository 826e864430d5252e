"""The result file: settings, environment, and one cell for each method and context length."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import apack_compile

FOLDER = Path(__file__).resolve().parents[1] / "results"

VERSIONS = ("torch", "transformers")
"""Of the environment, what cells of one file have in common."""


@dataclass
class Results:
    """Cells by method and context, written after each one.

    Attributes:
        path: of the JSON file.
        settings: what cells depend on besides method and context.
        environment: device and versions.
        command: that made (the last of) them.
        cells: in the order in which they were measured; each notes its device.
    """

    path: Path
    settings: dict[str, Any]
    environment: dict[str, Any]
    command: str
    cells: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def resume(
        cls, path: Path, settings: dict[str, Any], environment: dict[str, Any], command: str,
        files: Sequence[Path] | None = None,
    ) -> Results:  # fmt: skip
        """What files have, if it was measured with the same settings and versions.

        On which device matters little for quality: float32 is float32.

        Args:
            path: of the file that new cells are written to.
            settings, environment, command: of these.
            files: where to go on from; of a cell that several have, the last one's is taken. None:
                ``path``.
        """
        made = cls(path, settings, environment, command)
        cells: dict[tuple[str, int], dict[str, Any]] = {}
        for file in [path] if files is None else files:
            if not file.exists():
                continue
            old = json.loads(file.read_text(encoding="utf-8"))
            if alike(old, {"settings": settings, "environment": environment}):
                device = old["environment"]["device"]
                cells |= {key_of(cell): {"device": device, **cell} for cell in old["cells"]}
            else:
                print(f"{file.name} was measured with other settings or versions: made anew")
        made.cells = list(cells.values())
        return made

    def drop_outdated(self, sources: str) -> None:
        """Forget cells that other sources of attentionpack made."""
        kept = [c for c in self.cells if c.get("sources", sources) == sources]
        if len(kept) < len(self.cells):
            print(f"{len(self.cells) - len(kept)} cells are of other sources: measured anew")
        self.cells = kept

    def has(self, method: str, context: int) -> bool:
        """Whether there is such a cell."""
        return any(key_of(cell) == (method, context) for cell in self.cells)

    def add(self, cell: dict[str, Any]) -> None:
        """Add a cell and write the file."""
        self.cells.append({**cell, "device": self.environment["device"]})
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        content = {
            "command": self.command,
            "environment": self.environment,
            "settings": self.settings,
            "cells": self.cells,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write(self.path, rounded(content))


def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether cells of two result files may stand in one: same settings, same versions."""
    here, there = one["environment"], other["environment"]
    return one["settings"] == other["settings"] and all(here[n] == there[n] for n in VERSIONS)


def key_of(cell: Mapping[str, Any]) -> tuple[str, int]:
    """Of which there is one cell in a file: method and context."""
    return cell["method"], cell["context"]


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def rounded(value: Any) -> Any:
    """Floats to 6 significant digits, all through."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return value


def environment(device: torch.device) -> dict[str, Any]:
    """Device and versions."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    )
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attentionpack": apack_compile.__version__,
    }
