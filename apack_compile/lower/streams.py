"""Pieces of work that do not depend on each other, on several streams of a GPU.

Captured into a CUDA graph they become branches of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

COUNT = 8
"""Streams of a device; other numbers were not tried."""


class Streams:
    """Makes its streams when they are first needed, and keeps them."""

    def __init__(self) -> None:
        self._made: dict[torch.device, list[torch.cuda.Stream]] = {}

    def __call__(self, pieces: Iterable[Callable[[], None]], device: torch.device) -> None:
        """Run all pieces; the current stream goes on when all of them have ended.

        Each piece keeps to one stream with the memory that it takes, so that no other reuses it
        too early. On a device without streams they run in turn.
        """
        if device.type != "cuda":
            for piece in pieces:
                piece()
            return
        if device not in self._made:
            self._made[device] = [torch.cuda.Stream(device) for _ in range(COUNT)]
        streams, current = self._made[device], torch.cuda.current_stream(device)
        for stream in streams:
            stream.wait_stream(current)
        try:
            for number, piece in enumerate(pieces):
                with torch.cuda.stream(streams[number % COUNT]):
                    piece()
        finally:
            for stream in streams:
                current.wait_stream(stream)
