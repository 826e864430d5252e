"""Contexts drawn by worker processes while the model scores those before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import DataLoader, Dataset

from .contexts import Contexts, contexts
from .prompt import Prompter
from .tiles import Painter


@dataclass(frozen=True)
class Piece:
    """Contexts that go through the model at once.

    Attributes:
        task, length: which, and of how many tokens at most.
        numbers: of the contexts.
    """

    task: str
    length: int
    numbers: range


def pieces(task: str, length: int, count: int, tokens: int = 32768) -> list[Piece]:
    """The contexts 0 to ``count`` of a task and length, about ``tokens`` at once."""
    size = max(1, tokens // length)
    return [
        Piece(task, length, range(first, min(first + size, count)))
        for first in range(0, count, size)
    ]


class Drawn(Dataset[Contexts]):
    """Contexts of pieces.

    Args:
        painter: draws tiles.
        prompter: makes tokens.
        wanted: the pieces.
    """

    def __init__(self, painter: Painter, prompter: Prompter, wanted: Sequence[Piece]) -> None:
        self.painter = painter
        self.prompter = prompter
        self.wanted = list(wanted)
        # Made before there are workers: each of them would make its own.
        self.backgrounds = painter.backgrounds

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, number: int) -> Contexts:
        piece = self.wanted[number]
        return contexts(self.painter, self.prompter, piece.task, piece.length, piece.numbers)


def draw(
    painter: Painter, prompter: Prompter, wanted: Sequence[Piece], workers: int
) -> Iterator[tuple[Piece, Contexts]]:
    """Pieces with their contexts, in order; the same for any number of workers.

    Args:
        painter: draws tiles.
        prompter: makes tokens.
        wanted: the pieces.
        workers: processes that draw; 0: draw here, when it is asked for.
    """
    loader = DataLoader(
        Drawn(painter, prompter, wanted), batch_size=None, num_workers=workers,
        prefetch_factor=2 if workers else None,
    )  # fmt: skip
    return zip(wanted, loader, strict=True)
