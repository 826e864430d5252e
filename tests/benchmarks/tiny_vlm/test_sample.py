from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.tiny_vlm import pack, sample
from benchmarks.tiny_vlm.album import NUMBER
from benchmarks.tiny_vlm.contexts import contexts
from benchmarks.tiny_vlm.prompt import PLACES

from . import small


def test_the_album_of_the_repository() -> None:
    album = sample.load()
    assert album.tiles.shape == (42, 96, 96, 3)
    assert len(set(album.shown)) == 42
    number, page = album.printed
    assert (len(album.shown[number]), len(album.shown[page])) == (NUMBER, PLACES)
    assert album.what(number).text == "What is the number?"
    assert album.what(page).text == f"Read image {page + 1}."
    assert album.what(0).text == "What is in image 1?" and album.what(0).answer == album.shown[0]
    assert album.which(3).text == f"Which image shows the {album.shown[3]}?"
    assert album.which(3).answer == "4"
    assert album.page().size == (7 * 100, 6 * 112)


@pytest.mark.skipif(not pack.PACK.exists(), reason="the image pack was not built")
def test_it_is_what_its_script_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = sample.load()
    monkeypatch.setattr(sample, "FOLDER", tmp_path)
    sample.main()
    again = sample.load()
    assert np.array_equal(again.tiles, held.tiles)
    assert (again.shown, again.printed) == (held.shown, held.printed)


def test_albums_with_every_kind_of_question() -> None:
    batch = contexts(small.painter(), small.prompter(), "all", 512, range(2))
    for asked in batch.questions:
        assert sorted(q.kind for q in asked) == [
            "needle", "read", "what", "what", "which", "which",
        ]  # fmt: skip
        assert len({q.image for q in asked}) == 6
    other = contexts(small.painter(), small.prompter(), "all", 512, range(2), "train")
    assert (batch.tiles != other.tiles).any()
    assert batch.ids.shape[1] + batch.following.shape[1] <= 512
