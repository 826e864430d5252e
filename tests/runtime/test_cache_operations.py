"""What a model, ``generate`` or a person does to the cache gives what the dense cache gives."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import apack_compile
from apack_compile import PackedKV

from .. import zoo

EXACT = {"codec": "exact", "inner": "eager"}
RATIO = {"ratio": 4, "fit_tokens": 64, "inner": "eager"}


def prefilled(model: Any, batch: int = 2) -> Any:
    inputs = zoo.prompt(0, 150, batch, padded=False)
    cache = transformers.DynamicCache()
    model(input_ids=inputs["input_ids"], past_key_values=cache)
    return cache


def pickled(cache: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def reorder(cache: Any) -> Any:
    cache.reorder_cache(torch.tensor([1, 0]))
    return cache


def crop(cache: Any) -> Any:
    cache.crop(-20)
    return cache


def crop_into_codes(cache: Any) -> Any:
    cache.crop(-110)
    return cache


def select(cache: Any) -> Any:
    cache.batch_select_indices(torch.tensor([1]))
    return cache


def repeat(cache: Any) -> Any:
    cache.batch_repeat_interleave(2)
    return cache


def half_and_back(cache: Any) -> Any:
    for layer in cache.layers:
        layer.keys = layer.keys.to(torch.float16).to(torch.float32)
        layer.values = layer.values.half().float()
    return cache


OPERATIONS: list[Callable[[Any], Any]] = [
    copy.deepcopy, pickled, reorder, crop, crop_into_codes, select, repeat, half_and_back,
]  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
def test_operation_gives_what_the_dense_cache_gives_and_keeps_it_packed(
    operation: Callable[[Any], Any],
) -> None:
    model = zoo.llama().model
    dense = operation(prefilled(model))
    compiled = torch.compile(model, backend="attentionpack", options=EXACT)
    packed = operation(prefilled(compiled))
    batch = dense.layers[0].keys.shape[0]
    token = torch.randint(10, 190, (batch, 1))
    for layer, expected in zip(packed.layers, dense.layers, strict=True):
        assert isinstance(layer.keys, PackedKV) and isinstance(layer.values, PackedKV)
        torch.testing.assert_close(layer.keys.unpack(), expected.keys, rtol=1e-5, atol=1e-5)
    got = compiled(input_ids=token, past_key_values=packed).logits
    want = transformers.LlamaForCausalLM.forward(model, input_ids=token, past_key_values=dense)
    torch.testing.assert_close(got, want.logits, rtol=1e-4, atol=1e-4)
    assert all(isinstance(layer.keys, PackedKV) for layer in packed.layers)


@pytest.mark.parametrize("options", [EXACT, RATIO], ids=["exact", "ratio"])
def test_eager_forward_between_compiled_ones_uses_and_keeps_the_packed_cache(
    options: dict[str, Any],
) -> None:
    model = zoo.llama().model
    compiled = torch.compile(model, backend="attentionpack", options=options)
    packed = prefilled(compiled)
    twin = transformers.DynamicCache()
    for i, layer in enumerate(packed.layers):
        twin.update(layer.keys.unpack(), layer.values.unpack(), i)
    for step in range(40):
        token = torch.full((2, 1), 20 + step)
        eager = torch.compiler.disable(transformers.LlamaForCausalLM.forward)
        forward = eager if step % 3 == 1 else lambda _, **kw: compiled(**kw)
        got = forward(model, input_ids=token, past_key_values=packed).logits
        want = eager(model, input_ids=token, past_key_values=twin).logits
        if options is EXACT or step < 30:  # before the first flush nothing new is coded
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert all(isinstance(layer.keys, PackedKV) for layer in packed.layers)


def test_one_prefilled_cache_serves_two_continuations() -> None:
    model = zoo.llama().model
    compiled = torch.compile(model, backend="attentionpack", options=EXACT)

    def continued(run: Any, cache: Any, token: int) -> torch.Tensor:
        logits = []
        for step in range(40):
            out = run(input_ids=torch.full((1, 1), token + step), past_key_values=cache)
            logits.append(out.logits[:, -1])
        return torch.stack(logits)

    prompt_cache = prefilled(compiled, batch=1)
    first, second = copy.copy(prompt_cache), copy.copy(prompt_cache)
    for branch in (first, second):  # shallow copies: both share the very handles
        branch.layers = [copy.copy(layer) for layer in prompt_cache.layers]
    a, b = continued(compiled, first, 20), continued(compiled, second, 100)

    def eager(**kwargs: Any) -> Any:
        return transformers.LlamaForCausalLM.forward(model, **kwargs)

    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(
            a, continued(eager, prefilled(model, 1), 20), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            b, continued(eager, prefilled(model, 1), 100), rtol=1e-4, atol=1e-4
        )


def test_several_tokens_on_a_packed_cache_and_a_second_turn() -> None:
    """Chunked prefill and multi-turn chat: few tokens attend to codes, many to dense tensors."""
    model = zoo.llama().model
    compiled = torch.compile(model, backend="attentionpack", options=EXACT)
    packed, dense = prefilled(compiled), prefilled(model)
    for tokens in (5, 1, 40, 1, 16, 3):
        ids = torch.randint(10, 190, (2, tokens))
        got = compiled(input_ids=ids, past_key_values=packed).logits
        with torch.compiler.set_stance("force_eager"):
            want = model(input_ids=ids, past_key_values=dense).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert all(isinstance(layer.keys, PackedKV) for layer in packed.layers)


def test_several_tokens_of_any_number_attend_to_codes() -> None:
    """Bug: once Dynamo had a symbol for their number, every layer was made dense."""
    model = zoo.llama().model
    compiled = torch.compile(model, backend="attentionpack", options=EXACT)
    packed = prefilled(compiled)
    twin = transformers.DynamicCache()
    for i, layer in enumerate(packed.layers):
        twin.update(layer.keys.unpack(), layer.values.unpack(), i)
    counts = [1, 5, 3, 7, 20, 2, 30, 5, 1]
    for count in counts:
        ids = torch.randint(10, 190, (2, count))
        got = compiled(input_ids=ids, past_key_values=packed).logits
        want = transformers.LlamaForCausalLM.forward(model, input_ids=ids, past_key_values=twin)
        torch.testing.assert_close(got, want.logits, rtol=1e-4, atol=1e-4)
    report = apack_compile.report(model)
    assert report.attends == 2 * sum(count <= 16 for count in counts)
    assert report.recompiles == 0
    several = sum(count > 1 for count in counts)
    assert len([g for g in report.graph_reports if "decode" in dict(g.runs)]) <= several


@pytest.mark.parametrize("beams", [2, 3])
def test_beam_search_gives_the_dense_tokens(beams: int) -> None:
    case = zoo.llama()
    settings = dict(max_new_tokens=12, num_beams=beams, do_sample=False)
    expected = case.model.generate(**case.inputs, **settings)
    compiled = torch.compile(case.model, backend="attentionpack", options=EXACT)
    assert torch.equal(compiled.generate(**case.inputs, **settings), expected)
    assert apack_compile.report(case.model).attends > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_tokens_that_are_not_finite_stay_exact_and_do_not_crash(bad: float) -> None:
    """A NaN in the keys of one row must not touch the others, nor vanish."""
    model = zoo.plain_decoder()
    compiled = torch.compile(model, backend="attentionpack", options=RATIO)
    ids = torch.randint(10, 190, (2, 150))
    places = torch.arange(150).expand(2, -1)
    compiled(ids, places)  # learn the codes
    weight = model.place.weight.data
    weight[2000] = bad
    strange = places.clone()
    strange[1, 40] = 2000
    _, past = compiled(ids, strange)
    keys = past[0][0]
    assert isinstance(keys, PackedKV)
    dense = keys.unpack()
    assert not dense[1, :, 40].isfinite().any()
    assert dense[0].isfinite().all()
    assert dense[1, :, :40].isfinite().all() and dense[1, :, 41:].isfinite().all()


def test_two_handles_on_one_store_in_one_graph_grow_apart() -> None:
    """Bug: both wrote the same slots of the ring they share."""

    def fn(a: Any, b: Any, k: torch.Tensor, q: torch.Tensor) -> Any:
        keys, other = torch.cat([a, k], 2), torch.cat([b, k + 1], 2)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, keys, keys), attend(q, other, other), keys, other

    dense, k, q = torch.randn(2, 2, 100, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)
    packed = PackedKV.pack(dense)
    compiled = torch.compile(fn, backend="attentionpack", options=EXACT)
    got = compiled(packed, packed.detach(), k, q)
    want = fn(dense, dense, k, q)
    for mine, theirs in zip(got, want, strict=True):
        mine = mine.unpack() if isinstance(mine, PackedKV) else mine
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_write_to_the_grown_cache_is_kept() -> None:
    """Bug: only writes to the past were looked for."""

    def fn(past: Any, k: torch.Tensor, q: torch.Tensor) -> Any:
        keys = torch.cat([past, k], 2)
        keys[:, :, 0] = 0
        out = torch.nn.functional.scaled_dot_product_attention(q, keys, keys)
        keys.mul_(2)
        return out, keys

    dense, k, q = torch.randn(2, 2, 100, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)
    compiled = torch.compile(fn, backend="attentionpack", options=EXACT)
    for past in (PackedKV.pack(dense), dense):
        for mine, theirs in zip(compiled(past, k, q), fn(dense, k, q), strict=True):
            mine = mine.unpack() if isinstance(mine, PackedKV) else mine
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


WRITES: list[Callable[[Any], Any]] = [
    lambda x: x.mul_(2),
    lambda x: x[:, :, :4].zero_(),
    lambda x: x.transpose(1, 2)[0].add_(1),
    lambda x: x.__setitem__((slice(None), slice(None), 3), 5.0),
    lambda x: torch.add(x, 1, out=x),
]


@pytest.mark.parametrize("number", range(len(WRITES)))
def test_compiled_graph_that_writes_to_a_packed_input_keeps_the_write(number: int) -> None:
    """Bug: the write went to a dense copy that nobody kept."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        WRITES[number](x)
        return x.sum()

    dense = torch.randn(2, 2, 100, 8)
    packed = PackedKV.pack(dense)
    compiled = torch.compile(fn, backend="attentionpack", options=EXACT)
    got, want = compiled(packed), fn(dense)
    torch.testing.assert_close(got, want)
    assert isinstance(packed, PackedKV)
    torch.testing.assert_close(packed.unpack(), dense, rtol=0, atol=0)


def test_eager_steps_between_graphs_are_not_compiled() -> None:
    """Bug: Dynamo compiled PackedKV's dispatch, so that `shape` was `numel` and `cat` unpacked."""

    def steps(handle: PackedKV) -> list[Any]:
        seen: list[Any] = []
        for _ in range(2):
            torch._dynamo.graph_break()  # in a loop: all of it runs eagerly, calls are compiled
            grown = torch.cat([handle, torch.zeros(1, 2, 1, 16)], 2)
            seen += [handle.numel(), handle.shape, handle.dim(), type(grown), grown.shape]
        return seen

    compiled = torch.compile(steps, backend="attentionpack", options={"inner": "eager"})
    for length in (75, 80):
        shape, longer = (1, 2, length, 16), (1, 2, length + 1, 16)
        found = compiled(PackedKV.pack(torch.randn(shape)))
        assert found == [32 * length, shape, 4, PackedKV, longer] * 2
