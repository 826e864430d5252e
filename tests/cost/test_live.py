"""What the report says of caches that are there."""

from __future__ import annotations

import pytest
import torch

import apack_compile
from apack_compile.cache import Policy, SideStore
from apack_compile.codec import CodeRef, TransformLayout
from apack_compile.codec.evicting import evicting
from apack_compile.codec.fixed import fixed_ref
from apack_compile.cost import H100, device_of, live, predicted_bytes, predicted_step, seconds_of
from apack_compile.cost.live import first_coded, side_of

from .. import zoo
from ..helpers import hand_code
from .test_sizes import decode

KEYS = CodeRef(hand_code(TransformLayout(2, 16, 1, 16, 0, 0, 0)))
VALUES = CodeRef(hand_code(TransformLayout(2, 16, 1, 16, 0, 0, 1)))


def stores(
    site: str, batch: int = 1, tokens: int = 200, values: CodeRef = VALUES,
    dtype: torch.dtype = torch.bfloat16,
) -> list[SideStore]:  # fmt: skip
    """Keys and values of one layer."""
    made = []
    for name, ref in (("k", KEYS), ("v", values)):
        store = SideStore.encode(torch.randn(batch, 2, tokens, 16).to(dtype), ref, Policy())
        store.name = f"{site}.{name}"
        made.append(store)
    return made


def test_bytes_are_those_of_all_stores() -> None:
    alive = stores("one") + stores("two", 3, 100)
    assert predicted_bytes(alive) == sum(store.nbytes for store in alive)


def test_bytes_follow_the_cache() -> None:
    """The payload is that of the prompt until it is full, not one for all tokens."""
    (keys, _), prompt = stores("one", 2), 200
    decode(keys, 56)
    assert (keys.prompt, keys.length, keys.side.capacity) == (prompt, 256, 256)
    assert predicted_bytes([keys]) == keys.nbytes
    decode(keys, 500)
    assert keys.prompt == prompt and abs(predicted_bytes([keys]) / keys.nbytes - 1) < 0.05
    cut = keys.select(torch.tensor([1]), 150)
    assert (cut.prompt, cut.length) == (150, 150)
    empty = keys.select(torch.tensor([0]), 0)
    assert predicted_bytes([empty]) > 0


def test_a_step_reads_every_layer_once() -> None:
    one, two = stores("one"), stores("two", 3, 900)
    heads = {"one": 4, "two": 8}
    total = predicted_step(one + two, heads, H100)
    each = [
        seconds_of(side_of(k), side_of(v), heads[site], H100, batch, tokens - 64)
        for site, (k, v), batch, tokens in (("one", one, 1, 200), ("two", two, 3, 900))
    ]
    assert total == pytest.approx(sum(each))
    assert total > 2 * 3 * H100.launch
    assert predicted_step(one[::-1] + stores("one"), heads, H100) == pytest.approx(2 * each[0])


def test_a_step_knows_which_tokens_prefill_coded() -> None:
    """Only of those are some dropped; a crop may take some of them."""
    values = CodeRef(hand_code(evicting(TransformLayout(2, 16, 1, 16, 0, 0, 1), 16)))
    k, v = stores("one", tokens=9000, values=values)
    assert (k.coded, first_coded(k)) == (8936, 8936)
    for store in (k, v):
        decode(store, 128)
    sides = side_of(k), side_of(v)
    assert (k.coded, first_coded(k)) == (9032, 8936)
    want = seconds_of(*sides, 4, H100, 1, 9032, first=8936)
    assert predicted_step([k, v], {"one": 4}, H100) == pytest.approx(want)
    cut = k.select(torch.tensor([0]), 500)
    assert first_coded(cut) <= cut.coded == 500


def test_what_is_not_known_is_not_predicted() -> None:
    """Of one layer: then nothing is said of any."""
    known = stores("one")
    assert predicted_step(known, {"one": 4}) is None, "a CPU"
    assert device_of(torch.device("cpu")) is None
    assert predicted_step(known + stores("two"), {"one": 4}, H100) is None, "no heads"
    assert predicted_step(known[:1], {"one": 4}, H100) is None, "values are gone"
    exact = stores("two", values=fixed_ref("exact", 2, 16))
    single = stores("two", dtype=torch.float32)
    for unknown in (exact, single):
        assert predicted_step(known + unknown, {"one": 4, "two": 4}, H100) is None


def test_a_report_predicts_a_step_where_the_device_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = zoo.llama().model.to(torch.bfloat16)
    options = {"ratio": 4, "inner": "eager", "profile_cache": False}
    compiled = torch.compile(model, backend="attentionpack", options=options)
    cache = compiled(**zoo.llama(text=400).inputs).past_key_values
    assert apack_compile.report(model).predicted_step is None
    monkeypatch.setattr(live, "device_of", lambda _: H100)
    report = apack_compile.report(model)
    each = [
        seconds_of(side_of(x.keys.store), side_of(x.values.store), 4, H100, 1, 401 - 64)
        for x in cache.layers
    ]
    assert len(each) == 2 and report.predicted_step == pytest.approx(sum(each))
    assert f"one step: {1e3 * sum(each):.3f} ms predicted" in str(report)
