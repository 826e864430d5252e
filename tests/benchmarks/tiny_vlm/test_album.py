from __future__ import annotations

import numpy as np
import pytest

from benchmarks.tiny_vlm.album import MOVES, NUMBER, Album, Recipe, compose, questions
from benchmarks.tiny_vlm.prompt import PLACES
from benchmarks.tiny_vlm.sources import CELL, CHARACTERS
from benchmarks.tiny_vlm.tiles import COLOURS, COLUMNS, LINES, SIDE, Thing

from . import small


def made(seed: int, recipe: Recipe, count: int = 12) -> tuple[np.random.Generator, Album]:
    generator = np.random.default_rng(seed)
    return generator, compose(generator, small.painter(), "train", count, recipe)


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe(0.3, 0.3), Recipe(pages=1.0), Recipe(clip=True), Recipe(new=True)]
)
def test_albums_depend_on_the_seed_alone(recipe: Recipe) -> None:
    count = 10
    (first, album), (again, same) = made(7, recipe, count), made(7, recipe, count)
    np.testing.assert_array_equal(album.tiles, same.tiles)
    assert album.tiles.shape == (count, SIDE, SIDE, 3) and album.tiles.dtype == np.uint8
    asked = questions(first, small.painter(), album, 6, {})
    assert asked == questions(again, small.painter(), same, 6, {})
    assert not np.array_equal(album.tiles, made(8, recipe, count)[1].tiles)


def test_answers_are_right() -> None:
    kinds = set()
    for seed in range(20):
        generator, album = made(seed, Recipe(0.2, 0.2))
        for question in questions(generator, small.painter(), album, 12, {}):
            kinds.add(question.kind)
            thing = album.things[question.image]
            if question.kind == "which":
                assert isinstance(thing, Thing)
                assert question.text == f"Which image shows the {small.painter().label(thing)}?"
                assert album.things[int(question.answer) - 1] == thing
            elif question.kind == "what":
                assert isinstance(thing, Thing)
                assert question.text == f"What is in image {question.image + 1}?"
                assert question.answer == small.painter().label(thing)
            else:
                assert question.answer == thing
                assert len(question.answer) == (NUMBER if question.kind == "needle" else PLACES)
                assert question.answer.isdigit()
    assert kinds == {"which", "what", "needle", "read"}


def test_every_thing_is_there_once_and_asked_for_once() -> None:
    generator, album = made(0, Recipe())
    assert len(set(album.things)) == len(album.things)
    asked = questions(generator, small.painter(), album, 12, {})
    assert sorted(question.image for question in asked) == list(range(12))


def test_a_single_number_is_asked_for_without_its_image() -> None:
    generator, album = made(3, Recipe(numbers=1e-9))
    asked = questions(generator, small.painter(), album, 12, {"which": 0.0, "what": 0.0})
    assert [question.text for question in asked] == ["What is the number?"]
    assert len(asked[0].answer) == 5


def test_print_can_be_read_off_the_tile() -> None:
    painter = small.painter()
    tile = painter.print(np.random.default_rng(1), "train", ["ab", "", "z!"])
    height, width = CELL
    cells = tile.reshape(LINES, height, COLUMNS, width, 3).swapaxes(1, 2).astype(float)
    for (row, column), character in {(0, 0): "a", (0, 1): "b", (2, 0): "z", (2, 1): "!"}.items():
        seen = cells[row, column].mean(-1)
        matches = [
            abs(np.corrcoef(seen.ravel(), cell.ravel())[0, 1])
            for cell in painter.pack.atlas[:, CHARACTERS.index(character)]
        ]
        assert max(matches) > 0.8
    assert cells[1].std((2, 3)).max() < cells[0, 0].std()


def test_the_thing_of_a_clip_moves_as_is_said() -> None:
    seen = set()
    for seed in range(12):
        _, album = made(seed, Recipe(clip=True), 6)
        changed = np.abs(album.tiles.astype(int) - album.tiles[0]).sum((0, 3)) > 0
        first = np.abs(album.tiles[0].astype(int) - album.tiles[-1]).sum(-1) > 0
        assert changed.sum() >= first.sum() > 0
        ys, xs = np.nonzero(changed)
        wide = xs.max() - xs.min() > ys.max() - ys.min()
        assert wide == (MOVES[album.move][0] != 0)
        seen.add(album.move)
    assert seen == set(MOVES)


def test_training_lacks_pairs_but_no_glyph_and_no_colour() -> None:
    seen, new = (set(small.painter().things[split]) for split in ("seen", "new"))
    assert not seen & new and len(new) == 10
    glyphs = [thing for thing in seen if thing.colour]
    assert {thing.icon for thing in glyphs} == set(range(30, 40))
    assert {thing.colour for thing in glyphs} == set(COLOURS)


def test_no_background_is_in_both_splits() -> None:
    banks = small.painter().backgrounds
    train, test = ({tile.tobytes() for tile in banks[split]} for split in ("train", "test"))
    assert not train & test


def test_more_images_than_things_are_refused() -> None:
    with pytest.raises(ValueError, match="count=101"):
        made(0, Recipe(), 101)
