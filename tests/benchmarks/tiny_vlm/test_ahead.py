from __future__ import annotations

import torch

from benchmarks.tiny_vlm.ahead import Piece, draw, pieces
from benchmarks.tiny_vlm.contexts import contexts

from . import small


def test_pieces_have_every_context_once_and_at_most_so_many_tokens() -> None:
    made = pieces("which", 4096, 20)
    assert [piece.numbers for piece in made] == [range(0, 8), range(8, 16), range(16, 20)]
    assert pieces("read", 8000, 2, tokens=100) == [
        Piece("read", 8000, range(1)), Piece("read", 8000, range(1, 2)),
    ]  # fmt: skip


def test_workers_draw_what_is_drawn_without_them_and_in_order() -> None:
    wanted = [*pieces("which", 256, 4, tokens=512), *pieces("needle", 128, 1)]
    drawn = list(draw(small.painter(), small.prompter(), wanted, workers=2))
    assert [piece for piece, _ in drawn] == wanted
    assert len(drawn) == 3
    for piece, batch in drawn:
        numbers = (piece.task, piece.length, piece.numbers)
        expected = contexts(small.painter(), small.prompter(), *numbers)
        assert torch.equal(batch.ids, expected.ids)
        assert torch.equal(batch.tiles, expected.tiles)
        assert torch.equal(batch.following, expected.following)
        assert (batch.spans, batch.questions) == (expected.spans, expected.questions)
