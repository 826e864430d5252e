"""Prose, to keep the language model what it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quality.documents import Part, documents, read


def tokens(tokenizer: Any, part: Part) -> Tensor:
    """All documents of a part in a row, int64 ``[S]``."""
    texts = [read(path) for path in documents(part)]
    return torch.cat([tokenizer(text, return_tensors="pt").input_ids[0] for text in texts])
