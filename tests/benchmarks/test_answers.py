from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import albums
from benchmarks.quality.albums import KINDS, Albums, AlbumSetting, Asked
from benchmarks.quality.answers import Answers, AnswerSuite, exact
from benchmarks.quality.jobs import Claims
from benchmarks.quality.measure import Clock, Run, measure
from benchmarks.quality.methods import METHODS
from benchmarks.quality.packed import PIECE
from benchmarks.quality.results import Results, environment
from benchmarks.quality.rivals.dense import Dense
from benchmarks.quality.rivals.kivi import Kivi
from benchmarks.quality.runner import RivalRunner
from benchmarks.quality.subject import Subject
from benchmarks.quality.table import markdown
from benchmarks.tiny_vlm.contexts import contexts
from benchmarks.tiny_vlm.forward import pixels
from benchmarks.tiny_vlm.model import merge
from benchmarks.tiny_vlm.tiles import Painter

from .. import versions
from .tiny import texts, tokenizer
from .tiny_vlm import small

LENGTH, COUNT = 512, 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Albums:
    model = small.model()
    merge(model)
    folder = tmp_path_factory.mktemp("albums")
    return Albums(Subject(model, tokenizer()), small.painter(), "small", COUNT, 0, folder)


@pytest.fixture(scope="module")
def setting(made: Albums) -> AlbumSetting:
    following = made.at(LENGTH).following.shape[1]
    prose = texts(1, LENGTH)
    return AlbumSetting(made.subject, prose, following, "eager", (LENGTH,), made)


def suite(setting: AlbumSetting) -> AnswerSuite:
    return AnswerSuite(setting, setting.albums, 2)


@torch.no_grad()
@pytest.mark.skipif(versions.BEFORE_5, reason="the benchmarks want transformers 5")
def test_embeddings_are_what_the_model_makes_of_pixels(made: Albums) -> None:
    asked = made.at(LENGTH)
    batch = contexts(small.painter(), small.prompter(), "all", LENGTH, range(COUNT))
    model = made.model
    images = pixels(batch.tiles, torch.float32)
    expected = model(input_ids=batch.ids, pixel_values=images).logits
    torch.testing.assert_close(model(inputs_embeds=asked.prompts).logits, expected)
    assert asked.following.shape[1] % PIECE == 0
    assert asked.spans == batch.spans
    assert [sorted(row) for row in asked.kinds] == [
        ["needle", "read", "what", "what", "which", "which"]
    ] * COUNT


def test_albums_are_kept_and_found_again(made: Albums, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made.at(LENGTH)
    again = Albums(made.subject, made.painter, made.name, COUNT, 0, made.folder)
    monkeypatch.setattr(albums, "draw", None)  # nothing is drawn any more
    assert torch.equal(again.at(LENGTH).prompts, first.prompts)
    other = Albums(made.subject, made.painter, "other", COUNT, 0, made.folder)
    with pytest.raises(TypeError):
        other.at(LENGTH)


def test_albums_that_are_kept_are_of_their_pack_and_of_what_drew_them(
    made: Albums, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bug: after another pack was built, or drawing was changed, the old albums were measured."""
    made.at(LENGTH)
    monkeypatch.setattr(albums, "draw", None)  # drawing raises TypeError

    def again(painter: Painter) -> Any:
        return Albums(made.subject, painter, made.name, COUNT, 0, made.folder).at(LENGTH)

    again(made.painter)
    other = replace(made.painter.pack, icons=255 - made.painter.pack.icons)
    with pytest.raises(TypeError):
        again(Painter(other))
    first, *others = albums.SOURCES
    changed = tmp_path / first.name
    changed.write_bytes(first.read_bytes() + b"# another")
    monkeypatch.setattr(albums, "SOURCES", (changed, *others))
    with pytest.raises(TypeError):
        again(made.painter)


def test_calibration_shows_other_albums_than_the_test(made: Albums) -> None:
    prompts = made.calibration(LENGTH)
    assert len(prompts) == albums.CALIBRATION
    tiles = contexts(small.painter(), small.prompter(), "all", LENGTH, range(COUNT)).tiles
    test = pixels(tiles, torch.float32)
    for prompt in prompts:
        assert made.at(LENGTH).prompts.shape[1] < prompt["input_ids"].shape[1] <= LENGTH
        assert all((prompt["pixel_values"][0] - album).abs().max() > 0.1 for album in test)


def test_exact_is_by_task_and_needs_all_of_an_answer() -> None:
    following = torch.tensor([[5, 1, 2, 6, 3, 4, 7, 8, 9, 9]])
    kinds = [["which", "what", "what", "needle", "read"]]
    spans = [[(1, 3), (4, 5), (5, 6), (7, 8), (8, 9)]]
    asked = Asked(torch.zeros(1, 1, 1), following, spans, kinds)
    logits = torch.nn.functional.one_hot(following.roll(-1, 1), 10).float()
    assert exact(logits, asked) == {"which": [1], "what": [1], "needle": [1], "read": [1]}
    logits[0, [1, 3]] = 0  # the second token of "which", the first "what"
    assert exact(logits, asked) == {"which": [0], "what": [0.5], "needle": [1], "read": [1]}


@torch.no_grad()
def test_the_dense_cache_loses_nothing_and_a_coarse_code_does(setting: AlbumSetting) -> None:
    scorer = suite(setting)
    references = scorer.at(LENGTH, dense=True)
    assert [len(r.asked.spans) for r in references] == [2, 1]
    figures = {}
    for bits, rival in ((16, Dense()), (1, Kivi(1))):
        figures[bits], sizes = scorer.score(
            RivalRunner(setting.subject, rival), references, LENGTH
        )  # fmt: skip
        assert {len(values) for values in figures[bits]["by_window"].values()} == {COUNT}
        assert set(figures[bits]["lost"]) == set(KINDS)
    for kind, digits in figures[16]["by_window"].items():
        right = sum(map(int, digits)) / COUNT / (2 if kind in ("which", "what") else 1)
        assert figures[16][kind]["mean"] == pytest.approx(right)
    assert sizes.ratio > 3
    assert figures[16]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert figures[16]["top1"]["mean"] == 1
    for lost in figures[16]["lost"].values():  # nothing: which does not prove that there is nothing
        assert lost["high"] == -lost["low"] == pytest.approx(1 - 0.025 ** (1 / COUNT), rel=1e-5)
    assert figures[1]["kl"]["mean"] > 1e-5


@torch.no_grad()
def test_losses_are_of_the_same_contexts(setting: AlbumSetting) -> None:
    scorer = suite(setting)
    references = scorer.at(LENGTH, dense=True)
    for reference in references:
        reference.right = {kind: [1.0] * len(reference.asked.spans) for kind in KINDS}
    scores, _ = scorer.score(RivalRunner(setting.subject, Dense()), references, LENGTH)
    for kind in KINDS:
        assert scores["lost"][kind]["mean"] == pytest.approx(1 - scores[kind]["mean"])


@pytest.mark.parametrize("name", ["attentionpack 8x", "attentionpack 8x, fitted beforehand"])
@torch.no_grad()
def test_our_own_runs_through_the_compiled_backend(
    setting: AlbumSetting, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.quality.packed.FIT_TOKENS", 256)
    run = Run("images", (LENGTH,), COUNT, 0, "images", 2)
    methods = [m for m in METHODS if m.name == name]
    results = Results.resume(
        tmp_path / "q.json", {"windows": COUNT}, environment(setting.subject.device), "command"
    )
    assert measure(run, methods, setting, results, Clock(None), Claims(None), suite(setting))
    cell: dict[str, Any] = results.cells[0]
    assert cell["packed_attention_calls"] == cell["of"] > 0
    assert cell["ratio"] >= 7.9
    assert LENGTH // 2 < cell["fitted_for"] <= LENGTH
    assert 1e-7 < cell["kl"]["mean"] < 0.5
    table = markdown({"cells": [cell], "settings": {"windows": COUNT}, "command": "c",
                      "environment": results.environment})  # fmt: skip
    assert f"Context 512 tokens, {COUNT} albums" in table
    assert table.count("\n| ") == 1 + table.count("\n|---") and name in table


@torch.no_grad()
def test_dense_caches_of_long_contexts_are_let_go_of(
    setting: AlbumSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.quality.answers.HELD", 0)
    scorer = suite(setting)
    references: list[Answers] = scorer.at(LENGTH, dense=True)
    scorer.score(RivalRunner(setting.subject, Dense()), references, LENGTH)
    assert not any("prefilled" in vars(reference.prompts) for reference in references)
