from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.quality import __main__ as main
from benchmarks.quality.measure import Run
from benchmarks.quality.methods import METHODS
from benchmarks.quality.results import environment


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--windows", "25"], "--windows 25: accepted is 1 to 24"),
        (["--windows", "0"], "--windows 0: accepted is 1 to 24"),
        (["--context", "8000"], "--context 8000: accepted is 256 to 7680, without --full"),
        (["--context", "3072", "--full"], "--context 3072: accepted is 256 to 7680, without"),
        (["--device", "tpu"], "--device tpu: accepted are cpu, cuda"),
        (["--jobs", "0"], "--jobs 0: accepted is 1 or more"),
        (["--inner", "gcc"], "--inner gcc: accepted are inductor, aot_eager, eager"),
        (["--subject", "tiny-vlm", "--context", "256"], "--context 256: accepted is 512 to 8000"),
        (["--subject", "tiny-vlm", "--full"], "--full: not with --subject tiny-vlm"),
        (["--subject", "tiny-vlm", "--paper"], "--paper: not with --subject tiny-vlm"),
        (["--questions", "--full"], "--full and --questions: accepted is one of them"),
    ],
)
def test_wrong_arguments_name_what_is_accepted(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main.parse(words)
    assert message in capsys.readouterr().err


def test_runs() -> None:
    def run(*words: str) -> Run:
        return main.chosen(main.parse(list(words)))

    assert run() == Run("quality", (1024,), 4, 64, "short", 4)
    assert run("--windows", "2") == Run("quality", (1024,), 2, 64, "short", 2)
    assert run("--full") == Run("quality-full", (2048, 4096, 7680), 24, 128, "full", 8)
    assert run("--full", "--windows", "5").batch == 5
    assert run("--paper") == Run("quality-paper", (2048,), 24, 64, "paper", 8)
    assert run("--questions") == Run("quality-questions", (2048,), 48, 0, "questions", 8)
    assert run("--questions", "--context", "1024", "--windows", "3") == Run(
        "quality-questions-1024", (1024,), 3, 0, "questions", 3
    )
    assert run("--context", "3072", "--windows", "4") == Run(
        "quality-3072", (3072,), 4, 64, "target", 4
    )


def test_runs_on_albums() -> None:
    def run(*words: str) -> Run:
        return main.chosen(main.parse(["--subject", "tiny-vlm", *words]))

    assert run() == Run("quality-images", (4096,), 200, 0, "images", 8)
    assert run("--context", "1024", "--windows", "4") == Run(
        "quality-images", (1024,), 4, 0, "images", 4
    )
    names = [m.name for m in main.methods_of(run(), None)]
    for ratio in (2, 4, 6, 8, 12, 16):
        for title in ("", ", fitted beforehand", ", pre-RoPE K, fitted beforehand"):
            assert f"attentionpack {ratio}x{title}" in names
    for name in (
        "full precision", "full precision, in pieces", "KIVI 2 bit", "TurboQuant 4 bit",
        "SnapKV 8x", "StreamingLLM 8x",
        "attentionpack 8x, paper mode", "attentionpack 8x, tiers, fitted beforehand",
    ):  # fmt: skip
        assert name in names
    assert not any("QuantizedCache" in name for name in names)


def test_methods_of_a_run() -> None:
    names = [m.name for m in METHODS]
    assert len(set(names)) == len(names)
    for part in ("short", "full"):
        chosen = main.methods_of(Run("r", (2048,), 1, 1, part, 1), None)
        assert chosen[0].name == "full precision"
        assert any(m.name == "attentionpack 8x" for m in chosen)
        control = [m.name for m in chosen if m.name == "full precision, in pieces"]
        assert len(control) == (part == "full")
    target = main.methods_of(Run("r", (3072,), 1, 1, "target", 1), None)
    dense, *ours = [m.name.split(" ") for m in target]
    assert dense == ["full", "precision"] and {name[0] for name in ours} == {"attentionpack"}
    assert {name[1].rstrip("x,") for name in ours} == {"4", "5", "6", "8", "12", "16"}
    for part in ("paper", "questions"):
        chosen = main.methods_of(Run("r", (2048,), 1, 1, part, 1), None)
        names = {m.name for m in chosen}
        for name in (
            "full precision", "SnapKV 8x", "H2O 2x", "H2O 8x",
            "attentionpack 8x, fitted beforehand",
            "attentionpack 8x, tiers, fitted beforehand",
            "attentionpack 8x, 30 % evicted, fitted beforehand",
        ):  # fmt: skip
            assert name in names
        assert len(chosen) == {"paper": 49, "questions": 21}[part]
    few = main.methods_of(Run("r", (2048,), 1, 1, "short", 1), ["KIVI", "SVD 4x"])
    assert [m.name for m in few] == ["KIVI 4 bit", "KIVI 2 bit", "truncated SVD 4x (the paper)"]


def test_tiers_come_after_what_the_targets_are_about() -> None:
    tiered = ["tiers" in m.name for m in METHODS]
    first = tiered.index(True)
    assert all(tiered[first : first + 7]) and sum(tiered) == 7
    assert [m.name for m in METHODS[first + 7 :]] == [
        "attentionpack int8", "attentionpack int4", "attentionpack 8x, by Inductor",
    ]  # fmt: skip


def test_options_are_left_out_with_their_values() -> None:
    words = "--full --jobs 4 --methods A B --output=x --minutes 8 --fresh --output y"
    kept = main.without(words.split(), "--jobs", "--output")
    assert kept == ["--full", "--methods", "A", "B", "--minutes", "8"]


def test_a_whole_name_means_one_method() -> None:
    run = main.chosen(main.parse([]))
    assert [m.name for m in main.methods_of(run, ["attentionpack 8x"])] == ["attentionpack 8x"]
    some = [m.name for m in main.methods_of(run, ["8x, pre-RoPE"])]
    assert some == [
        "attentionpack 8x, pre-RoPE K, fitted beforehand",
        "attentionpack 8x, pre-RoPE K",
    ]


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """The command line, without a model and with nothing left to measure."""
    cpu = SimpleNamespace(subject=SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(main, "about_prose", lambda *_: (cpu, {"windows": 4}, None))
    monkeypatch.setattr(main, "measure", lambda *_: True)
    monkeypatch.setattr(main, "publish", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["quality", *words])
    assert main.main() == 0


def left(folder: Path, name: str) -> None:
    cells: list[dict[str, Any]] = [{"method": "A", "context": 1, "sources": main.sources()}]
    about = {"environment": environment(torch.device("cpu")), "settings": {"windows": 4}}
    (folder / name).write_text(json.dumps({**about, "cells": cells}))


def test_what_a_run_that_was_killed_left_is_there_with_nothing_to_add(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left(tmp_path, "q.0.json")
    run_main(monkeypatch, "--output", str(tmp_path / "q.json"))
    assert [p.name for p in tmp_path.iterdir()] == ["q.json"]
    assert [c["method"] for c in json.loads((tmp_path / "q.json").read_text())["cells"]] == ["A"]


def test_fresh_means_nothing_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: what an earlier run of several processes had left was merged all the same."""
    left(tmp_path, "q.json")
    left(tmp_path, "q.0.json")
    run_main(monkeypatch, "--fresh", "--output", str(tmp_path / "q.json"))
    assert not list(tmp_path.iterdir())
