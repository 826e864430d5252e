from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from benchmarks.quality.methods import METHODS
from benchmarks.quality.packed import PIECE
from benchmarks.quality.rivals.base import RECENT, SINKS, Layer
from benchmarks.quality.rivals.kivi import Kivi
from benchmarks.quality.rivals.streaming import Streaming
from benchmarks.quality.rivals.truncated_svd import rotate
from benchmarks.quality.runner import RivalRunner, Setting
from benchmarks.quality.subject import Prompts, Subject, dense_cache

from . import tiny


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny.subject()


def test_the_prefill_is_that_of_the_model(subject: Subject) -> None:
    ids = tiny.texts(2, 80)
    cache = DynamicCache()
    expected = subject.model(ids, past_key_values=cache).logits[:, -1]
    layers, logits = subject.prefill(ids)
    torch.testing.assert_close(logits, expected)
    assert len(layers) == subject.layers == 2
    for layer, held in zip(layers, cache.layers, strict=True):
        torch.testing.assert_close(layer.k, held.keys)
        torch.testing.assert_close(layer.v, held.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_row_of_the_table_is_an_image(dtype: torch.dtype) -> None:
    subject = tiny.subject()
    subject.model.to(dtype)
    ids = tiny.texts(3, 40)
    assert subject.visual(ids) is None
    embeddings = subject.model.get_input_embeddings()(ids).detach()
    where = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.4
    where[2] = False
    embeddings[where] += 0.01
    found = subject.visual(embeddings)
    assert found is not None and torch.equal(found, where)


def test_queries_rotation_and_attention_are_those_of_the_model(subject: Subject) -> None:
    ids = tiny.texts(1, 80)
    attention = subject.model.model.layers[1].self_attn
    seen = []
    hook = attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    layers, _ = subject.prefill(ids)
    hook.remove()
    layer = layers[1]
    raw = attention.k_proj(seen[0]).unflatten(-1, (-1, 16)).transpose(1, 2)
    torch.testing.assert_close(rotate(raw, layer.cos, layer.sin), layer.k)
    q = attention.q_proj(seen[0]).unflatten(-1, (-1, 16)).transpose(1, 2)
    q = rotate(q, layer.cos, layer.sin)
    torch.testing.assert_close(layer.queries, q[:, :, -RECENT:])
    weights = (q @ layer.k.repeat_interleave(2, 1).mT / 4).masked_fill(
        torch.ones(80, 80, dtype=torch.bool).triu(1), float("-inf")
    )
    received = weights.softmax(-1).sum(2).unflatten(1, (-1, 2)).sum(2)  # [1, H, 80]
    torch.testing.assert_close(layer.received, received)


def test_what_follows_sees_the_cache_and_leaves_it_as_it_is(subject: Subject) -> None:
    ids = tiny.texts(2, 100)
    expected = subject.model(ids).logits[:, 80:]
    layers, _ = subject.prefill(ids[:, :80])
    kv = [(layer.k, layer.v) for layer in layers]
    for _ in range(2):
        torch.testing.assert_close(subject.follow(kv, 80, ids[:, 80:]), expected)


def test_the_control_follows_in_pieces_as_ours_does(subject: Subject) -> None:
    """Bug: there was no row for the rounding that pieces bring in 16 bits: ours alone had it."""
    prompts = Prompts(subject, tiny.texts(2, 80))
    setting = Setting(subject, tiny.texts(1, 80), 40, "eager", (80,))
    dense, pieces = (
        next(m for m in METHODS if m.name == name).start(setting)
        for name in ("full precision", "full precision, in pieces")
    )
    ids, seen = tiny.texts(2, 40), []
    cache = pieces.prefill(prompts)
    hook = subject.model.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )  # fmt: skip
    for _ in range(2):  # the cache stays as it is
        got = pieces.follow(cache, ids)
    hook.remove()
    assert seen == [PIECE, PIECE, 8] * 2
    expected = dense.follow(dense.prefill(prompts), ids)
    torch.testing.assert_close(got, expected)


def test_dropped_tokens_are_as_if_masked(subject: Subject) -> None:
    context, following = 120, 20
    ids = tiny.texts(1, context + following)
    layers, _ = subject.prefill(ids[:, :context])
    code = Streaming(4)
    kept = code.kept(context - SINKS - RECENT)
    got = subject.follow([code.code(layer) for layer in layers], context, ids[:, context:])
    seen = torch.ones(following, context + following, dtype=torch.bool).tril(context)
    seen[:, SINKS : context - RECENT - kept] = False
    expected = subject.model(
        ids[:, context:],
        past_key_values=dense_cache([(layer.k, layer.v) for layer in layers]),
        attention_mask=seen[None, None],
    ).logits
    torch.testing.assert_close(got, expected)
    dense = subject.follow([(y.k, y.v) for y in layers], context, ids[:, context:])
    assert (got - dense).abs().max() > 1e-3


def test_the_greedy_continuation_is_that_of_generate(subject: Subject) -> None:
    ids = tiny.texts(2, 80)
    expected = subject.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
    layers, logits = subject.prefill(ids)
    assert torch.equal(subject.continue_greedily(layers, logits, 6), expected[:, 80:])


def test_rivals_code_in_float32_whatever_the_models_dtype() -> None:
    subject = Subject(tiny.subject().model.bfloat16(), tiny.tokenizer())
    prompts = Prompts(subject, tiny.texts(2, 200))
    (k, v), *_ = RivalRunner(subject, Kivi(4)).prefill(prompts)[0]
    layer = prompts.layers[0]
    assert k.dtype == v.dtype == layer.k.dtype == torch.bfloat16
    exact = Layer(
        layer.k.float(), layer.v.float(), layer.cos, layer.sin, layer.queries, layer.received
    )
    expected = Kivi(4).code(exact)
    assert torch.equal(k, expected[0].bfloat16()) and torch.equal(v, expected[1].bfloat16())
    rough, _ = Kivi(4).code(layer)
    assert not torch.equal(rough, k)  # in bfloat16 the code itself would lose
