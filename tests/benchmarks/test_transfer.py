from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.quality import bases, transfer
from benchmarks.quality.albums import Albums
from benchmarks.quality.answers import Answers, AnswerSuite
from benchmarks.quality.subject import Subject
from benchmarks.tiny_vlm.model import merge

from .tiny import texts, tokenizer
from .tiny_vlm import small

LENGTH, COUNT = 512, 2


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> transfer.SourceSetting:
    model = small.model()
    merge(model)
    folder: Path = tmp_path_factory.mktemp("albums")
    made = Albums(Subject(model, tokenizer()), small.painter(), "small", COUNT, 0, folder)
    return transfer.SourceSetting(
        made.subject, texts(6, LENGTH), 128, "eager", (LENGTH,), made, LENGTH
    )  # fmt: skip


def own_bytes(setting: transfer.SourceSetting, references: list[Answers]) -> float:
    """Means and bases of one sequence, in the mean: bug: they were not counted."""
    layers = references[0].prompts.layers
    counts = []
    for row in range(COUNT):
        own = bases.sums(bases._row(layers, row))
        made = bases.codes(own, setting.subject.dim, transfer.RATIO)
        # of each side: a mean of 32 numbers, and as many for each component that is kept
        counts += [2 * 32 * (1 + side.layout.rank) for pair in made for side in pair]
    return sum(counts) / COUNT


@torch.no_grad()
def test_every_choice_of_bases_codes_albums(setting: transfer.SourceSetting) -> None:
    suite = AnswerSuite(setting, setting.albums, COUNT)
    references = suite.at(LENGTH, dense=True)
    figures = {}
    for method in transfer.lab(setting, LENGTH):
        runner = method.start(setting)
        scores, sizes = suite.score(runner, references, LENGTH)
        name = method.name.removeprefix("bases: ")
        figures[name] = scores["kl"]["mean"]
        length = references[0].prompts.length
        width = 4 * setting.subject.layers * setting.subject.heads * setting.subject.dim
        packed = width / transfer.RATIO * (length - 68)
        if name == "one of each sequence":
            packed += own_bytes(setting, references)
        assert sizes.ratio == pytest.approx(width * (length - 68) / packed)
        assert sizes.whole_ratio == pytest.approx(width * length / (packed + width * 68))
        assert (sizes.ratio < 0.9 * transfer.RATIO) == (name == "one of each sequence")
    assert set(figures) == set(transfer.BASES)
    assert len(set(figures.values())) == len(figures)
    assert all(0 < kl < 1 for kl in figures.values())


@torch.no_grad()
def test_a_basis_of_images_codes_images_better_than_one_of_prose(
    setting: transfer.SourceSetting,
) -> None:
    found = transfer.Lab(setting, LENGTH)
    layers = AnswerSuite(setting, setting.albums, COUNT).at(LENGTH, True)[0].prompts.layers
    mask = next(iter(found.masks.values()))

    def wrong(source: list[bases.Moments]) -> float:
        made = bases.codes(source, setting.subject.dim, transfer.RATIO)
        v, code = layers[0].v, made[0][1]
        lost = bases._read_back(code, v) - v
        return float(lost[:, :, mask].square().sum() / v[:, :, mask].square().sum())

    assert wrong(found.visual) < 0.9 * wrong(found.prose)


def test_calibration_prompts_are_of_the_kinds_that_are_asked_for(
    setting: transfer.SourceSetting,
) -> None:
    def kinds(source: transfer.Source) -> list[bool]:
        own = transfer.replace(setting, source=source)
        return ["pixel_values" in batch for batch in own.calibration(LENGTH)]

    for source in ("albums", "prose"):  # bug: albums were longer by what follows a context
        own = transfer.replace(setting, source=source)
        tokens = [batch["input_ids"].shape[1] for batch in own.calibration(LENGTH)]
        assert all(0.9 * LENGTH < count <= LENGTH for count in tokens)
    assert kinds("albums") == [True] * 6
    assert kinds("prose") == [False] * 6
    assert kinds("both") == [True, False] * 3
