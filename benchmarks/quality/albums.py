"""Albums of images with questions, for the small vision-language model of our own.

Every context has one of each task: see ``TASKS["all"]`` of :mod:`benchmarks.tiny_vlm.contexts`.
Its images are looked at once, and kept as embeddings for all methods, in the cache folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..tiny_vlm import adapter, pack
from ..tiny_vlm.ahead import draw, pieces
from ..tiny_vlm.contexts import Contexts, contexts
from ..tiny_vlm.forward import embed, pixels, see
from ..tiny_vlm.prompt import Prompter
from ..tiny_vlm.tiles import Painter
from .packed import PIECE
from .runner import Setting
from .subject import Inputs, Subject

KINDS = ("which", "what", "needle", "read")
"""Tasks, as they are reported."""

CALIBRATION = 6
"""Albums to fit on: others than those of the test, with other backgrounds."""

FIRST = 10_000
"""Number of the first of them."""

SOURCES = tuple(
    Path(adapter.__file__).with_name(f"{name}.py")
    for name in ("album", "contexts", "forward", "prompt", "tiles")
)
"""What albums depend on besides the model and the image pack: kept ones are of these sources."""

TILES = 1024
"""Images that are looked at together."""


@dataclass(frozen=True)
class Asked:
    """Contexts of one length.

    Attributes:
        prompts: embeddings of the albums, ``[N, P, hidden]``.
        following: questions and answers, ``[N, T]``; T is a multiple of ``PIECE``, rows are padded
            at the end.
        spans: for each row, where in ``following`` each answer starts and ends.
        kinds: for each row, the task of each answer.
    """

    prompts: Tensor
    following: Tensor
    spans: list[list[tuple[int, int]]]
    kinds: list[list[str]]

    def rows(self, first: int, count: int) -> Asked:
        """Some of them."""
        some = slice(first, first + count)
        return Asked(
            self.prompts[some], self.following[some], self.spans[some], self.kinds[some]
        )  # fmt: skip


class Albums:
    """Contexts of any length for a model, made when they are first asked for.

    Args:
        subject: a SmolVLM of :mod:`benchmarks.tiny_vlm.model`, merged.
        painter: draws the images.
        name: of the model, its dtype included: what is kept is for it.
        count: contexts of a length.
        workers: processes that draw.
        folder: where contexts are kept.
    """

    def __init__(
        self, subject: Subject, painter: Painter, name: str, count: int, workers: int, folder: Path
    ) -> None:
        self.subject = subject
        self.model = subject.model
        self.painter = painter
        self.prompter = Prompter(subject.tokenizer)
        self.name = name
        self.count = count
        self.workers = workers
        self.folder = folder
        self._held: dict[int, Asked] = {}

    @torch.no_grad()
    def at(self, length: int) -> Asked:
        """The contexts of at most ``length`` tokens, answers included."""
        if length not in self._held:
            drawn = f"{self.painter.pack.checksum()[:12]}-{drawn_by()}"
            path = self.folder / f"albums-{self.name}-{drawn}-{self.count}-{length}.pt"
            if not path.exists():
                self._make(length, path)
            kept = torch.load(path, mmap=True)
            self._held[length] = Asked(**kept)
        return self._held[length]

    def _make(self, length: int, path: Path) -> None:
        prompts, following, spans, kinds = [], [], [], []
        wanted = pieces("all", length, self.count)
        for _, batch in draw(self.painter, self.prompter, wanted, self.workers):
            prompts.append(self.embedded(batch).cpu())
            following += batch.following.tolist()
            spans += batch.spans
            kinds += [[question.kind for question in row] for row in batch.questions]
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        kept = {"prompts": torch.cat(prompts), "following": self._padded(following)}
        torch.save({**kept, "spans": spans, "kinds": kinds}, draft)
        os.replace(draft, path)

    def _padded(self, rows: list[list[int]]) -> Tensor:
        length = -(-max(map(len, rows)) // PIECE) * PIECE
        return torch.tensor([row + self.prompter.end * (length - len(row)) for row in rows])

    def embedded(self, batch: Contexts) -> Tensor:
        """Embeddings of albums, ``[B, P, hidden]``."""
        device = self.subject.device
        seen = [see(self.model, t.to(device)) for t in batch.tiles.flatten(0, 1).split(TILES)]
        places = batch.places(self.prompter.image_id).to(device)
        return embed(self.model, batch.ids.to(device), places, torch.cat(seen))

    def others(self, length: int) -> Contexts:
        """Contexts of at most ``length`` tokens that are not those of the test."""
        numbers = range(FIRST, FIRST + CALIBRATION)
        return contexts(self.painter, self.prompter, "all", length, numbers, "train")

    def calibration(self, length: int) -> list[Inputs]:
        """Albums with questions and answers to fit on, of at most ``length`` tokens, as pixels.

        All end where the shortest does: prompts of one length are traced once.
        """
        batch = self.others(length)
        shortest = min(spans[-1][1] for spans in batch.spans)
        ids = torch.cat([batch.ids, batch.following[:, :shortest]], 1).to(self.subject.device)
        images = (tiles[None].to(self.subject.device) for tiles in batch.tiles)
        return [
            {"input_ids": row[None], "pixel_values": pixels(tiles, self.model.dtype)}
            for row, tiles in zip(ids, images, strict=True)
        ]


@dataclass(frozen=True)
class AlbumSetting(Setting):
    """A setting whose calibration prompts are albums, and whose contexts are so long with all that
    follows.

    Attributes:
        albums: which draw them.
    """

    albums: Albums

    @property
    def longest(self) -> int:
        """Tokens of the longest context with what follows it."""
        return max(self.contexts)

    @property
    def learnt_from(self) -> int:
        """Tokens of the longest context, without what follows."""
        return self.longest - self.following

    def calibration(self, length: int) -> list[Inputs]:
        """Albums of about so many tokens, with questions and answers."""
        return self.albums.calibration(length + self.following)


def load(path: Path, device: str, dtype: torch.dtype, count: int, workers: int) -> Albums:
    """Albums for a trained adapter."""
    model, tokenizer = adapter.load(path, dtype)
    subject = Subject(model.to(device), tokenizer)
    name = f"{adapter.digest(path)}-{str(dtype).removeprefix('torch.')}-{device}"
    return Albums(subject, Painter(pack.load()), name, count, workers, pack.CACHE / "albums")


def drawn_by() -> str:
    """The first digits of a SHA-256 of the sources that draw albums, ask, and look at images."""
    made = hashlib.sha256()
    for path in SOURCES:
        made.update(path.read_bytes())
    return made.hexdigest()[:12]


def batches(asked: Asked, size: int) -> Iterator[Asked]:
    """All contexts, so many at once."""
    for first in range(0, len(asked.spans), size):
        yield asked.rows(first, size)
