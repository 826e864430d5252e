"""Codes that were fitted once are found again: in this process, and in the next."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import apack_compile
from apack_compile.fitting import keep, learn
from apack_compile.fitting.file import read_profile
from apack_compile.fitting.layer import PROFILES
from apack_compile.runtime import study

from .. import zoo

OPTIONS = {"ratio": 8, "inner": "eager"}


def runs(model: Any) -> dict[str, int]:
    """How often graphs of ``model`` ran, by what was run."""
    counts: dict[str, int] = {}
    for graph in apack_compile.report(model).graph_reports:
        for what, count in graph.runs:
            counts[what] = counts.get(what, 0) + count
    return counts


def origin(model: Any) -> str:
    (text,) = {g.profile for g in apack_compile.report(model).graph_reports if g.profile}
    return text


def prefill(case: zoo.Case, options: dict[str, Any], ids: torch.Tensor | None = None) -> Any:
    """One prefill of a freshly compiled model: logits and cache."""
    torch._dynamo.reset()
    compiled = torch.compile(case.model, backend="attentionpack", options=options)
    return compiled(**case.inputs) if ids is None else compiled(input_ids=ids)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.*"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_codes_are_found_again_and_are_the_same(_cache_folder: Path) -> None:
    case = zoo.llama(text=400)
    first = prefill(case, OPTIONS).past_key_values
    assert runs(case.model) == {"fit": 1}
    (path,) = files(_cache_folder)
    assert origin(case.model) == f"fitted on 397 tokens, saved to {path}"
    before = apack_compile.report(case.model).errors
    again = prefill(case, OPTIONS).past_key_values
    assert runs(case.model) == {"encode": 1}
    assert origin(case.model) == f"loaded from {path}, fitted on 397 tokens"
    assert f"codes: loaded from {path}" in str(apack_compile.report(case.model))
    assert apack_compile.report(case.model).errors == before and len(before) == 4
    for mine, theirs in zip(first.layers, again.layers, strict=True):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert a.store.ref.layout == b.store.ref.layout
            for p, q in zip(a.store.ref.code.params, b.store.ref.code.params, strict=True):
                assert torch.equal(p, q)


FRESH = """
import torch, apack_compile
from tests import zoo

case = zoo.llama(text=400)
model = torch.compile(case.model, backend="attentionpack", options={options})
with torch.no_grad():
    model(**case.inputs)
(graph,) = apack_compile.report(case.model).graph_reports
print(dict(graph.runs), graph.profile)
"""


def test_a_fresh_process_finds_them(_cache_folder: Path) -> None:
    prefill(zoo.llama(text=400), OPTIONS)
    (path,) = files(_cache_folder)
    done = subprocess.run(
        [sys.executable, "-c", FRESH.format(options=OPTIONS)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == (
        f"{{'encode': 1}} loaded from {path}, fitted on 397 tokens"
    )
    assert done.stderr == "", "nothing is said unasked"


def test_an_image_graph_finds_what_a_text_graph_fitted(_cache_folder: Path) -> None:
    case = zoo.llava(text=400)
    prefill(case, OPTIONS, case.inputs["input_ids"][:, 5:])
    assert runs(case.model)["fit"] == 1
    prefill(case, OPTIONS)
    assert "fit" not in runs(case.model) and runs(case.model)["encode"] == 1
    assert len(files(_cache_folder)) == 1


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj"])
def test_a_weight_that_changed_anywhere_in_the_decoder_is_another_decoder(
    _cache_folder: Path, name: str
) -> None:
    case = zoo.llama(text=400)
    prefill(case, OPTIONS)
    weight = case.model.get_parameter(f"model.layers.1.{name}.weight")
    low_rank = torch.randn(weight.shape[0], 1) @ torch.randn(1, weight.shape[1])
    weight.data = weight.data + 1e-3 * low_rank
    prefill(case, OPTIONS)
    assert runs(case.model) == {"fit": 1}
    assert len(files(_cache_folder)) == 2


def test_other_options_have_other_codes(_cache_folder: Path) -> None:
    case = zoo.llama(text=400)
    prefill(case, OPTIONS)
    prefill(case, {**OPTIONS, "ratio": 4})
    assert runs(case.model) == {"fit": 1}
    assert len(files(_cache_folder)) == 2
    prefill(case, {**OPTIONS, "window": 16, "sinks": 2})
    assert runs(case.model) == {"encode": 1}, "codes do not depend on these"


def test_with_the_cache_off_nothing_is_read_or_written(_cache_folder: Path) -> None:
    case = zoo.llama(text=400)
    off = {**OPTIONS, "profile_cache": False}
    prefill(case, off)
    assert files(_cache_folder) == [] and origin(case.model) == "fitted on 397 tokens"
    prefill(case, OPTIONS)
    prefill(case, off)
    assert runs(case.model) == {"fit": 1}


def test_a_damaged_file_is_fitted_over_with_one_warning(
    _cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = zoo.llama(text=400)
    prefill(case, OPTIONS)
    (path,) = files(_cache_folder)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    prefill(case, OPTIONS)
    assert runs(case.model) == {"fit": 1}
    (warning,) = warnings(caplog)
    assert warning.startswith(f"attentionpack: the profile {path} is not used: it is damaged")
    assert read_profile(path).tokens == 397


def test_a_folder_that_cannot_be_written_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTENTIONPACK_CACHE", str(tmp_path / "file"))
    case = zoo.llama(text=400)
    prefill(case, OPTIONS)
    assert runs(case.model) == {"fit": 1} and origin(case.model) == "fitted on 397 tokens"
    assert len(warnings(caplog)) == 2


def test_a_prompt_beyond_the_reach_of_the_file_is_fitted_and_saved_anew(
    _cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn, "LEAST_REACH", 300)
    case = zoo.llama(text=1000)
    ids = case.inputs["input_ids"]
    prefill(case, OPTIONS, ids[:, :300])
    (path,) = files(_cache_folder)
    assert {layer.reach for layer in read_profile(path).layers} == {600}
    prefill(case, OPTIONS, ids)
    assert runs(case.model) == {"fit": 1}
    assert {layer.reach for layer in read_profile(path).layers} == {2002}
    prefill(case, OPTIONS, ids[:, :300])
    assert runs(case.model) == {"encode": 1}


def test_short_prompts_look_for_a_file_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    def find(fingerprint: str, options: str) -> None:
        looked.append(fingerprint)

    read, digests = [], keep.digests

    def counted(weights: Any) -> Any:
        read.append(len(weights))
        return digests(weights)

    monkeypatch.setattr(keep, "find_profile", find)
    monkeypatch.setattr(keep, "digests", counted)
    case = zoo.llama(text=60)
    compiled = torch.compile(case.model, backend="attentionpack", options=OPTIONS)
    for _ in range(2):
        compiled(**case.inputs)
    assert runs(case.model) == {"fit": 2} and len(looked) == 1
    assert len(read) == 1, "bug: every short prompt read all weights again"
    assert "114 of 128 tokens seen" in str(apack_compile.report(case.model))


def test_two_threads_fit_once(_cache_folder: Path) -> None:
    case = zoo.llama(text=400)
    compiled = torch.compile(case.model, backend="attentionpack", options=OPTIONS)
    with torch.no_grad():
        compiled(input_ids=torch.ones(1, 2, dtype=torch.int64))  # traced before the threads start
    failed: list[BaseException] = []
    start = threading.Barrier(2)

    def work() -> None:
        try:
            start.wait()
            with torch.no_grad():
                compiled(**case.inputs)
        except BaseException as error:
            failed.append(error)

    PROFILES.clear()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    fitted = [g for g in apack_compile.report(case.model).graph_reports if g.profile]
    assert sum(dict(g.runs).get("encode", 0) for g in fitted) == 1
    assert {g.profile.split(",")[0] for g in fitted} == {"fitted on 397 tokens"}


def test_a_fit_that_fails_leaves_a_model_that_runs_exactly(
    _cache_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> None:
        raise torch.linalg.LinAlgError("eigh did not converge\nand more")

    monkeypatch.setattr(learn, "fit_transform", broken)
    case = zoo.llama(text=400)
    with torch.compiler.set_stance("force_eager"):
        expected = case.model(**case.inputs)
    got = prefill(case, OPTIONS)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(
        got.past_key_values.layers, expected.past_key_values.layers, strict=True
    ):
        torch.testing.assert_close(mine.keys.unpack(), theirs.keys, rtol=1e-4, atol=1e-5)
    (graph,) = apack_compile.report(case.model).graph_reports
    assert {reason for _, reason in graph.notes} == {"eigh did not converge: packed exactly"}
    assert graph.profile == "" and files(_cache_folder) == []
    assert len(warnings(caplog)) == 1
    compiled = torch.compile(case.model, backend="attentionpack", options=OPTIONS)
    compiled(**case.inputs)
    assert runs(case.model) == {"fit": 1, "encode": 1}, "it is not tried again"


def test_a_sensitivity_that_fails_gives_every_layer_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr(study, "measure", broken)
    case = zoo.llama(text=400)
    cache = prefill(case, OPTIONS).past_key_values
    (graph,) = apack_compile.report(case.model).graph_reports
    assert {reason for _, reason in graph.notes} == {
        "sensitivity not measured ('no such thing'): the same bits in every layer"
    }
    assert len({layer.keys.store.ref.layout for layer in cache.layers}) == 1
    assert cache.layers[0].keys.store.ref.layout.kind == "transform"


def test_layers_of_several_graphs_are_told_apart_in_the_report() -> None:
    """Bug: sites of different graphs have the same names; later layers took the place of others.

    Bug: errors measured of layers of the same name were put together.
    """
    case = zoo.aria(text=200)  # a graph for every layer
    options = {"ratio": 8, "inner": "eager", "window": 8, "block": 16, "fit_tokens": 64}
    compiled = torch.compile(case.model, backend="attentionpack", options=options)
    with torch.no_grad():
        out = compiled(**case.inputs, use_cache=True)
    report = apack_compile.report(case.model)
    assert len(report.errors) == 4 and report.sites == 2
    assert len({error for _, error in report.errors}) == 4
    sides = [side for layer in out.past_key_values.layers for side in (layer.keys, layer.values)]
    tallies = [side.store.tally.tolist() for side in sides]
    assert sorted(error for _, (error, _) in report.measured) == pytest.approx(
        sorted(error / size for error, size, _ in tallies)
    )
    other = torch.compile(case.model, backend="attentionpack", options=options | {"ratio": 4})
    with torch.no_grad():
        other(**case.inputs, use_cache=True)
    both = apack_compile.report(case.model)
    assert len(both.errors) == 4 and both.sites == 2, "those compiled with last"
    assert both.errors != report.errors
