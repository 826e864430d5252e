from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.tiny_vlm import pack as packs
from benchmarks.tiny_vlm.sources import GLYPHS, clear

from . import small


def test_a_pack_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "pack.npz"
    packs.save(small.pack(), path)
    back = packs.load(path)
    assert back.names == small.pack().names and back.emoji == 30
    np.testing.assert_array_equal(back.icons, small.pack().icons)
    np.testing.assert_array_equal(back.atlas, small.pack().atlas)


def test_the_same_content_makes_the_same_file(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        packs.save(small.pack(), tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_every_part_of_the_content_is_in_the_checksum() -> None:
    whole = small.pack()
    icons, atlas = whole.icons.copy(), whole.atlas.copy()
    icons[3, 5, 7, 0] ^= 1
    atlas[0, 1, 2, 3] ^= 1
    changed = [
        replace(whole, icons=icons), replace(whole, atlas=atlas), replace(whole, emoji=29),
        replace(whole, names=("other", *whole.names[1:])),
    ]  # fmt: skip
    assert len({p.checksum() for p in [whole, *changed]}) == 5


def test_a_damaged_pack_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pack.npz"
    packs.save(small.pack(), path)
    with np.load(path) as file:
        content = dict(file)
    content["icons"] = content["icons"] ^ 1
    np.savez(path, **content)
    with pytest.raises(ValueError, match="damaged"):
        packs.load(path)


def test_no_pack_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.tiny_vlm\.pack"):
        packs.load(tmp_path / "none.npz")


def test_names_that_are_unclear_are_left_out() -> None:
    assert clear("red apple") and clear("t-shirt")
    unclear = ["grinning face", "up arrow", "A button", "cat with tears of joy", "Peru", "piñata"]
    assert not any(map(clear, unclear))


def test_glyphs_are_listed_once() -> None:
    assert len(set(GLYPHS)) == len(GLYPHS)
