from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.subject import Subject, smollm2

from .. import zoo


def subject() -> Subject:
    """A tiny Llama with random weights behind the real tokenizer."""
    tokenizer: Any = smollm2.load_tokenizer()
    return Subject(zoo.llama(vocab_size=49152).model, tokenizer)


def texts(rows: int, tokens: int) -> Tensor:
    """Random tokens ``[rows, tokens]``."""
    return torch.randint(100, 49152, (rows, tokens), generator=torch.Generator().manual_seed(3))
