"""``apack_compile.predict``, beside the caches that models then have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import apack_compile
from apack_compile import OptionError
from apack_compile.fitting.layer import PROFILES

from .. import zoo

OPTIONS = {"ratio": 8, "inner": "eager", "profile_cache": False}


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="attentionpack", options={**OPTIONS, **options})


def prefill(model: Any, text: int = 400, batch: int = 1, **options: Any) -> Any:
    return compiled(model, **options)(**zoo.llama(text=text, batch=batch).inputs).past_key_values


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"window": 80, "block": 16, "sinks": 1}, {"tiers": True, "ratio": 4},
        {"exact_share": 0.02},
        {"evict": 0.3, "ratio": 4},
        {"tiers": True, "exact_share": 0.02, "k_code": "pre-rope", "window": 32, "ratio": 6,
         "evict": 0.2},
    ],
    ids=["default", "policy", "tiers", "exact_share", "evict", "all together"],
)  # fmt: skip
def test_a_prediction_is_the_cache_that_the_next_prompt_makes(changes: Any) -> None:
    model = zoo.llama().model
    tokens = prefill(model, **changes).get_seq_length()
    assert tokens == 401
    before = apack_compile.predict(model, batch=3, tokens=601)
    cache = prefill(model, 600, 3, **changes)
    assert apack_compile.cache_bytes(cache) == before
    assert str(before).startswith(f"{before.dense / 1e6:.2f} MB dense")


def test_fitted_or_loaded_codes_are_enough(tmp_path: Path) -> None:
    """No graph was compiled yet."""
    model, path = zoo.llama().model, tmp_path / "codes.safetensors"
    apack_compile.fit(model, [zoo.llama(text=400).inputs], OPTIONS, measure=False)
    apack_compile.save_profile(model, path)
    fitted = apack_compile.predict(model, batch=1, tokens=401)
    torch._dynamo.reset()
    PROFILES.clear()
    apack_compile.load_profile(model, path)
    assert apack_compile.predict(model, batch=1, tokens=401) == fitted
    assert apack_compile.predict(compiled(model), batch=1, tokens=401) == fitted
    assert apack_compile.cache_bytes(prefill(model)) == fitted


def test_new_tokens_are_counted() -> None:
    model = zoo.llama().model
    cache = prefill(model, 1200)
    decode = compiled(model)
    token = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(200):
        decode(token, past_key_values=cache)
    assert cache.get_seq_length() == 1401
    held = apack_compile.cache_bytes(cache)
    found = apack_compile.predict(model, batch=1, tokens=1201, new_tokens=200)
    assert found.dense == held.dense and found.window == held.window
    assert abs(found.packed / held.packed - 1) < 0.05
    assert apack_compile.predict(model, batch=1, tokens=1201).packed < found.packed


def test_the_dtype_is_that_of_the_weights_or_the_one_given() -> None:
    model = zoo.llama().model
    prefill(model)
    single = apack_compile.predict(model, batch=1, tokens=401)
    half = apack_compile.predict(model, batch=1, tokens=401, dtype=torch.bfloat16)
    assert (half.dense, half.window) == (single.dense // 2, single.window // 2)
    assert half.codes == single.codes


def test_the_options_compiled_with_last_count_unless_others_are_given() -> None:
    model = zoo.llama().model
    prefill(model)
    prefill(model, ratio=4)
    four = apack_compile.predict(model, batch=1, tokens=4096)
    eight = apack_compile.predict(model, batch=1, tokens=4096, options=OPTIONS)
    assert 1.5 < (four.codes + four.gains) / (eight.codes + eight.gains) < 2.1
    apack_compile.runtime.stats.REGISTRY.clear()
    message = "options=None: there are codes for several sets of options (('transform', Recipe("
    with pytest.raises(ValueError, match=re.escape(message)):
        apack_compile.predict(model, batch=1, tokens=4096)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch=0: accepted is a whole number from 1 on"),
        ({"batch": True}, "batch=True: accepted is a whole number from 1 on"),
        ({"tokens": 1.5}, "tokens=1.5: accepted is a whole number from 1 on"),
        ({"new_tokens": -1}, "new_tokens=-1: accepted is a whole number from 0 on"),
        ({"dtype": "half"}, "dtype='half': accepted is a floating-point dtype, or None"),
        ({"dtype": torch.int8}, "dtype=torch.int8: accepted is a floating-point dtype, or None"),
        ({}, "model: it has no codes: run a prompt through"),
        ({"options": {"ratio": 6}}, "model: it has no codes with the options ('transform', Recipe"),
    ],
)
def test_what_is_not_accepted_is_named(arguments: Any, message: str) -> None:
    model = zoo.llama().model
    with pytest.raises(ValueError, match=re.escape(message)):
        apack_compile.predict(model, **{"batch": 1, "tokens": 10, **arguments})


def test_codes_that_need_no_fit_are_refused() -> None:
    model = zoo.llama().model
    message = "option codec='int8' has no fitted codes to predict from: accepted is 'transform'"
    with pytest.raises(OptionError, match=re.escape(message)):
        apack_compile.predict(model, batch=1, tokens=10, options={"codec": "int8"})
    options = {"codec": "int8", "inner": "eager"}
    torch.compile(model, backend="attentionpack", options=options)(**zoo.llama().inputs)
    with pytest.raises(OptionError, match=re.escape(message)):
        apack_compile.predict(model, batch=1, tokens=10)
    with pytest.raises(TypeError, match=r"model=3: accepted is an nn\.Module"):
        apack_compile.predict(3, batch=1, tokens=10)  # type: ignore[arg-type]


def test_layers_that_wait_for_codes_are_named() -> None:
    model = zoo.llama().model
    prefill(model, 40)
    with pytest.raises(ValueError, match="model: 2 of its layers have no codes yet: run a prompt"):
        apack_compile.predict(model, batch=1, tokens=10)


def test_weights_that_are_no_numbers_of_a_cache_need_a_dtype() -> None:
    model = zoo.llama().model
    prefill(model)
    weight = model.model.layers[0].self_attn.k_proj.weight
    (codes,) = PROFILES.of_weight(weight).items()
    rounded = torch.nn.Linear(2, 2)
    rounded.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    PROFILES.put(rounded.weight, *codes)
    with pytest.raises(ValueError, match=r"dtype=None: weights of a layer are torch\.int8"):
        apack_compile.predict(rounded, batch=1, tokens=10)
    assert apack_compile.predict(rounded, batch=1, tokens=10, dtype=torch.float16).dense > 0
