from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.subject import Subject, smollm2

from .. import zoo


@cache
def tokenizer() -> Any:
    """The real one; reading it takes seconds."""
    return smollm2.load_tokenizer()


def subject() -> Subject:
    """A tiny Llama with random weights behind the real tokenizer."""
    return Subject(zoo.llama(vocab_size=49152).model, tokenizer())


def texts(rows: int, tokens: int) -> Tensor:
    """Random tokens ``[rows, tokens]``."""
    return torch.randint(100, 49152, (rows, tokens), generator=torch.Generator().manual_seed(3))
