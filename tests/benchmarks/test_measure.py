from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import measure
from benchmarks.quality.jobs import Claims
from benchmarks.quality.measure import Clock, Run
from benchmarks.quality.method import Method
from benchmarks.quality.results import Results, environment
from benchmarks.quality.rivals.dense import Dense
from benchmarks.quality.rivals.kivi import Kivi
from benchmarks.quality.runner import RivalRunner, Setting, Unavailable

from . import tiny

RUN = Run("tiny", (256, 288), 3, 4, "short", 2)


def method(name: str, rival: Any) -> Method:
    return Method(
        name, name, frozenset({"short"}), lambda setting: RivalRunner(setting.subject, rival)
    )


def missing(setting: Setting) -> Any:
    raise Unavailable("not here")


class Broken(Dense):
    def code(self, layer: Any) -> Any:
        raise ZeroDivisionError("broken")


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting(tiny.subject(), tiny.texts(1, 300), 16, "eager", RUN.contexts)


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "NEXT", 16)


def results(path: Path, setting: Setting) -> Results:
    return Results.resume(path, {"windows": 3}, environment(setting.subject.device), "command")


def test_every_cell_is_measured_once(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = [method("dense", Dense()), Method("none", "none", frozenset(), missing)]
    made = results(tmp_path / "q.json", setting)
    assert measure.measure(RUN, methods, setting, made, Clock(None), Claims(None))
    cells = [(c["method"], c["context"]) for c in made.cells]
    assert cells == [("dense", 256), ("dense", 288)]
    assert capsys.readouterr().out.count("none: left out: not here") == 1
    methods.append(method("kivi", Kivi(2)))
    again = results(tmp_path / "q.json", setting)
    assert measure.measure(RUN, methods, setting, again, Clock(None), Claims(None))
    content = json.loads((tmp_path / "q.json").read_text())
    assert [(c["method"], c["context"]) for c in content["cells"]] == [
        *cells, ("kivi", 256), ("kivi", 288),
    ]  # fmt: skip
    for cell in content["cells"]:
        assert cell["kl"]["low"] <= cell["kl"]["mean"] <= cell["kl"]["high"]
        assert {len(values) for values in cell["by_window"].values()} == {3}
    printed = capsys.readouterr().out
    assert printed.count("2/4 kivi, 256 tokens: ratio ") == 1 and "dense" not in printed


def test_batches_of_windows_give_what_one_batch_gives(setting: Setting, tmp_path: Path) -> None:
    cells = []
    for batch in (2, 3):
        made = results(tmp_path / f"{batch}.json", setting)
        run = Run("tiny", (288,), 3, 4, "short", batch)
        assert measure.measure(
            run, [method("kivi", Kivi(2))], setting, made, Clock(None), Claims(None)
        )
        cells.append(made.cells[0]["by_window"])
    assert cells[0]["kl"] == pytest.approx(cells[1]["kl"], rel=1e-3)
    assert cells[0]["depths"] == cells[1]["depths"]


def test_a_cell_that_fails_is_said_and_the_others_go_on(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = [method("broken", Broken()), method("dense", Dense())]
    made = results(tmp_path / "q.json", setting)
    assert not measure.measure(RUN, methods, setting, made, Clock(None), Claims(None))
    assert [c["method"] for c in made.cells] == ["dense", "dense"]
    out, err = capsys.readouterr()
    assert "broken, 256 tokens: FAILED" in out and "ZeroDivisionError" in err


def test_no_cell_is_started_without_time(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = results(tmp_path / "q.json", setting)
    clock = Clock(1)
    clock.longest = 61
    assert not measure.measure(RUN, [method("dense", Dense())], setting, made, clock, Claims(None))
    assert made.cells == []
    assert "time is up" in capsys.readouterr().out


def test_two_processes_measure_every_cell_once(setting: Setting, tmp_path: Path) -> None:
    methods = [
        method("dense", Dense()),
        method("attentionpack A", Dense()),
        method("attentionpack B", Dense()),
    ]
    done: list[list[tuple[str, int]]] = []
    claims = Claims(tmp_path)
    assert claims.take("rivals, 288 tokens") and claims.take("attentionpack A")
    for number in range(2):
        made = results(tmp_path / f"{number}.json", setting)
        own = claims if number else Claims(tmp_path)
        measure.measure(RUN, methods, setting, made, Clock(None), own)
        done.append([(c["method"], c["context"]) for c in made.cells])
    assert done[0] == [("dense", 256), ("attentionpack B", 256), ("attentionpack B", 288)]
    assert done[1] == [("dense", 288), ("attentionpack A", 256), ("attentionpack A", 288)]


def test_dense_caches_are_made_again_after_a_release(setting: Setting) -> None:
    references = measure.References(RUN, setting)
    reference, *more = references.at(256, dense=True)
    assert len(more) == 1 and references.at(256, dense=True)[0] is reference
    before = reference.prompts.layers
    assert reference.prompts.layers[0].k is before[0].k
    references.at(288, dense=True)
    after = reference.prompts.layers
    assert after[0].k is not before[0].k and (after[0].k == before[0].k).all()


def test_our_own_methods_hold_no_dense_caches(setting: Setting) -> None:
    references = measure.References(RUN, setting)
    for reference in references.at(256, dense=True) + references.at(288, dense=False):
        assert "prefilled" not in vars(reference.prompts)
    assert "prefilled" not in vars(references.at(256, dense=False)[0].prompts)


def test_rivals_come_by_context_and_ours_by_method() -> None:
    methods = [Method(n, n, frozenset(), missing) for n in ("attentionpack", "A", "B")]
    order = [(m.name, context) for m, context in measure.cells(RUN, methods)]
    assert order == [
        ("A", 256), ("B", 256), ("A", 288), ("B", 288),
        ("attentionpack", 256), ("attentionpack", 288),
    ]  # fmt: skip
