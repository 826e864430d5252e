from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import __main__ as main
from benchmarks.quality.methods import METHODS, Method, Setting
from benchmarks.quality.results import Results, environment
from benchmarks.quality.rivals.dense import Dense
from benchmarks.quality.rivals.kivi import Kivi
from benchmarks.quality.runner import RivalRunner, Unavailable

from . import tiny

RUN = main.Run("tiny", (256, 288), 2, 4, "short")


def method(name: str, rival: Any) -> Method:
    return Method(
        name, name, frozenset({"short"}), lambda setting: RivalRunner(setting.subject, rival)
    )


def missing(setting: Setting) -> Any:
    raise Unavailable("not here")


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(main, "NEXT", 16)
    return Setting(tiny.subject(), tiny.texts(1, 300), 16, "aot_eager")


def results(path: Path, setting: Setting) -> Results:
    return Results.resume(path, {"windows": 2}, environment(setting.subject.device), "command")


def test_every_cell_is_measured_once(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = [method("dense", Dense()), Method("none", "none", frozenset(), missing)]
    made = results(tmp_path / "q.json", setting)
    assert main.measure(RUN, methods, setting, made, main.Clock(None))
    cells = [(c["method"], c["context"]) for c in made.cells]
    assert cells == [("dense", 256), ("dense", 288)]
    assert capsys.readouterr().out.count("none: left out: not here") == 1
    methods.append(method("kivi", Kivi(2)))
    again = results(tmp_path / "q.json", setting)
    assert main.measure(RUN, methods, setting, again, main.Clock(None))
    content = json.loads((tmp_path / "q.json").read_text())
    assert [(c["method"], c["context"]) for c in content["cells"]] == [
        *cells, ("kivi", 256), ("kivi", 288),
    ]  # fmt: skip
    assert all(c["kl"]["low"] <= c["kl"]["mean"] <= c["kl"]["high"] for c in content["cells"])


def test_no_cell_is_started_without_time(setting: Setting, tmp_path: Path) -> None:
    made = results(tmp_path / "q.json", setting)
    clock = main.Clock(1)
    clock.longest = 61
    assert not main.measure(RUN, [method("dense", Dense())], setting, made, clock)
    assert made.cells == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--windows", "25"], "--windows 25: accepted is 1 to 24"),
        (["--windows", "0"], "--windows 0: accepted is 1 to 24"),
        (["--context", "8000"], "--context 8000: accepted is 256 to 7680, without --full"),
        (["--context", "3072", "--full"], "--context 3072: accepted is 256 to 7680, without"),
        (["--device", "tpu"], "--device tpu: accepted are cpu, cuda"),
        (["--inner", "eager"], "--inner eager: accepted are inductor, aot_eager"),
    ],
)
def test_wrong_arguments_name_what_is_accepted(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main.parse(words)
    assert message in capsys.readouterr().err


def test_runs() -> None:
    def run(*words: str) -> main.Run:
        return main.chosen(main.parse(list(words)))

    assert run() == main.Run("quality", (2048,), 6, 64, "short")
    assert run("--full") == main.Run("quality-full", (2048, 4096, 7680), 24, 128, "full")
    assert run("--context", "3072", "--windows", "4") == main.Run(
        "quality-3072", (3072,), 4, 64, "target"
    )


def test_methods_of_a_run() -> None:
    names = [m.name for m in METHODS]
    assert len(set(names)) == len(names)
    for part in ("short", "full"):
        chosen = main.methods_of(main.Run("r", (2048,), 1, 1, part), None)
        assert chosen[0].name == "full precision"
        assert any(m.name == "attentionpack 8x" for m in chosen)
    target = main.methods_of(main.Run("r", (3072,), 1, 1, "target"), None)
    assert {m.name.split(" ")[0] for m in target} == {"attentionpack"}
    assert {m.name.split(" ")[1].rstrip("x,") for m in target} == {"4", "6", "8"}
    few = main.methods_of(main.Run("r", (2048,), 1, 1, "short"), ["KIVI", "SVD 4x"])
    assert [m.name for m in few] == ["KIVI 4 bit", "KIVI 2 bit", "truncated SVD 4x (the paper)"]
