"""Prose: public-domain documents, calibration and test apart, and windows of their tokens."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

DATA = Path(__file__).resolve().parents[1] / "data"

Part = Literal["calibration", "test"]


def documents(part: Part) -> list[Path]:
    """The files of one part, by year."""
    return sorted((DATA / part).glob("*.txt.gz"))


def spread(paths: list[Path], count: int) -> list[Path]:
    """``count`` of the files, evenly spread over the years.

    Raises:
        ValueError: there are not so many.
    """
    if not 1 <= count <= len(paths):
        raise ValueError(f"windows={count}: accepted is 1 to {len(paths)}, one a document")
    last = len(paths) - 1
    return [paths[round(i * last / max(count - 1, 1))] for i in range(count)]


def read(path: Path) -> str:
    """The text of a document."""
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def windows(tokenizer: Tokenizer, part: Part, count: int, length: int) -> Tensor:
    """The first ``length`` tokens of ``count`` documents: int64 ``[count, length]``.

    Raises:
        ValueError: there are not so many documents, or one of them is too short.
    """
    rows = []
    for path in spread(documents(part), count):
        ids = tokenizer(read(path), return_tensors="pt", add_special_tokens=False).input_ids[0]
        if len(ids) < length:
            raise ValueError(f"{path.name} has {len(ids)} tokens, and {length} are wanted")
        rows.append(ids[:length])
    return torch.stack(rows)  # [count, length]
