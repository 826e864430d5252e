"""Prose for printed pages, and to keep the language model what it was."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..quality.documents import Part, documents, read
from .sources import CHARACTERS
from .tiles import COLUMNS


@cache
def words(part: Part) -> list[str]:
    """Words of the documents of a part that fit on a line of a tile."""
    text = " ".join(read(path) for path in documents(part)).split()
    return [word for word in text if len(word) <= COLUMNS and set(word) <= set(CHARACTERS)]


def tokens(tokenizer: Any, part: Part) -> Tensor:
    """All documents of a part in a row, int64 ``[S]``."""
    texts = [read(path) for path in documents(part)]
    return torch.cat([tokenizer(text, return_tensors="pt").input_ids[0] for text in texts])
