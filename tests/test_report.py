from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import apack_compile
from apack_compile.cache import Policy, SideStore
from apack_compile.codec.fixed import fixed_ref
from apack_compile.fitting.layer import LayerProfile
from apack_compile.runtime.stats import REGISTRY, GraphRecord

from .helpers import modal_ref


@pytest.fixture(autouse=True)
def _no_records() -> Iterator[None]:
    REGISTRY.clear()
    yield
    REGISTRY.clear()


def store(record: GraphRecord, name: str, *tally: float) -> SideStore:
    """A cache that a graph made: error, size and expected error of its coded tokens."""
    made = SideStore.encode(torch.randn(1, 2, 9, 8), fixed_ref("int8", 2, 8), Policy())
    made.name, made.tally = name, torch.tensor(tally)
    made.known_to(record.stores)
    return made


def test_measured_errors_are_those_of_layers_not_of_names() -> None:
    """Two graphs have one layer, a third another one of the same name, a fourth knows no layer."""
    records = [REGISTRY.new() for _ in range(4)]
    one, other = LayerProfile(), LayerProfile()
    for record, layer in zip(records, (one, one, other), strict=False):
        record.layers["attention"] = layer
    alive = [
        store(records[0], "attention.k", 1, 10, 2), store(records[1], "attention.k", 5, 10, 2),
        store(records[1], "attention.v", 1, 4, 1), store(records[2], "attention.k", 8, 10, 4),
        store(records[3], "attention.k", 1, 2, 2), store(records[3], "attention.k", 0, 0, 0),
    ]  # fmt: skip
    found = apack_compile.report().measured
    assert [name for name, _ in found] == ["attention.k"] * 3 + ["attention.v"]
    pairs = sorted(pair for _, pair in found)
    want = [(0.25, 1.0), (0.3, 1.5), (0.5, 0.5), (0.8, 2.0)]
    assert torch.allclose(torch.tensor(pairs), torch.tensor(want))
    del alive
    assert apack_compile.report().measured == ()


def test_an_error_of_several_kinds_is_the_mean_over_the_tokens() -> None:
    """Each relative to its own kind: sizes of two codes have two units."""
    record = REGISTRY.new()
    alive = [
        store(record, "attention.k", 2, 100, 3, 8, 16, 1),
        store(record, "attention.k", 0, 0, 0, 8, 16, 1),
        store(record, "attention.v", 0, 0, 0, 0, 0, 0),
    ]  # fmt: skip
    ((name, (error, drift)),) = apack_compile.report().measured
    assert name == "attention.k"
    assert error == pytest.approx((3 * 0.02 + 2 * 0.5) / 5) and drift == pytest.approx(18 / 5)
    assert apack_compile.report().by_kind == (), "none of these codes has kinds"
    del alive


def test_tokens_of_each_kind_are_counted_with_their_ratios() -> None:
    record, ref = REGISTRY.new(), modal_ref()
    x = torch.randn(2, 2, 164, 8)
    visual, real = torch.arange(164) < torch.tensor([[60], [30]]), torch.ones(2, 164) > 0
    real[1, :10] = False
    made = SideStore.encode(x, ref, Policy(extra=0), real, visual=visual)
    made.known_to(record.stores)
    text, images = apack_compile.report().by_kind
    assert images.tokens == (60 - 4) + (30 - 10 - 4), "no sinks, no padding"
    assert text.tokens == (100 - 60) + (100 - 30)
    bytes_ = [ref.layout.token_bytes(torch.float16, kind) for kind in (0, 1)]
    assert (text.ratio, images.ratio) == (32 / bytes_[0], 32 / bytes_[1])
    line = "by kind, in the mean over sides of layers: 72.0 visual tokens coded at 4.57x, 110.0 of"
    assert line in str(apack_compile.report())


def test_the_ratio_of_the_coded_part_stands_beside_that_of_the_whole_cache() -> None:
    record = REGISTRY.new()
    made = SideStore.encode(torch.randn(1, 2, 200, 8), fixed_ref("int8", 2, 8), Policy())
    assert apack_compile.report().coded is None
    made.known_to(record.stores)
    report = apack_compile.report()
    assert report.coded is not None and report.coded.dense == (200 - 64 - 4) * 16 * 2
    assert report.coded.ratio == 32 / (16 + 2 * 2), "a byte a number, a gain for each head"
    text = str(report)
    assert "their coded part: 1.60x of 16-bit numbers, gains counted; 0.0 tokens" in text
    assert f"({report.dense_bytes / report.packed_bytes:.2f}x)" in text


def test_predicted_bytes_stand_beside_those_held() -> None:
    record = REGISTRY.new()
    text = str(apack_compile.report())
    assert "cost model" not in text, "no cache is alive"
    made = store(record, "attention.k", 0, 0, 0)
    held = made.nbytes
    report = apack_compile.report()
    assert (report.predicted_bytes, report.packed_bytes) == (held, held)
    line = f"  cost model: {held / 1e6:.2f} MB predicted, {held / 1e6:.2f} MB held"
    assert line in str(report).splitlines()
    grown = SideStore.encode(torch.randn(4, 2, 900, 8), fixed_ref("int8", 2, 8), Policy())
    grown.known_to(record.stores)
    for token in torch.randn(4, 2, 300, 8).split(1, 2):
        grown.reserve(1)
        grown.extend(token)
    report = apack_compile.report()
    assert report.packed_bytes == held + grown.nbytes != report.predicted_bytes
    assert abs(report.predicted_bytes / report.packed_bytes - 1) < 0.05


def test_a_predicted_time_is_shown_where_there_is_one() -> None:
    report = replace(apack_compile.report(), packed_bytes=12_410_000, predicted_bytes=12_300_000)
    assert report.predicted_step is None
    line = "  cost model: 12.30 MB predicted, 12.41 MB held"
    assert line in str(report).splitlines()
    timed = replace(report, predicted_step=1.2346e-3)
    more = "; packed attention of all of them, one step: 1.235 ms predicted"
    assert line + more in str(timed).splitlines()


def test_caches_on_a_cpu_have_no_predicted_time() -> None:
    record = REGISTRY.new()
    record.q_heads = {"attention": 4}
    alive = [store(record, f"attention.{side}", 0, 0, 0) for side in "kv"]
    assert apack_compile.report().predicted_step is None
    del alive
