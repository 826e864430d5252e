from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import apack_compile
from apack_compile.runtime.study import Studies
from benchmarks.quality.packed import PIECE, PackedRunner, fitted_on
from benchmarks.quality.rivals.base import RECENT, SINKS
from benchmarks.quality.runner import Setting, Unavailable
from benchmarks.quality.subject import Prompts, Subject

from . import tiny

CONTEXT, NEXT = 256, 96


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny.subject()


def setting(subject: Subject, *contexts: int) -> Setting:
    contexts = contexts or (CONTEXT,)
    return Setting(subject, tiny.texts(1, max(contexts)), NEXT, "eager", contexts)


def runner(subject: Subject, coded_once: bool = True, **options: Any) -> PackedRunner:
    return PackedRunner(setting(subject), {"ratio": 4, **options}, False, coded_once)


def prompts(subject: Subject) -> Prompts:
    return Prompts(subject, tiny.texts(2, CONTEXT) + 1)


def test_context_is_coded_once_and_attended_to_as_codes(subject: Subject) -> None:
    packed = runner(subject)
    cache = packed.prefill(prompts(subject))
    ids = tiny.texts(2, NEXT)
    logits = packed.follow(cache, ids)
    assert logits.shape == (2, NEXT, 49152)
    calls = subject.layers * NEXT // PIECE
    notes = packed.notes()
    assert (notes["packed_attention_calls"], notes["of"]) == (calls, calls)
    assert {side.shape[2] for y in cache.layers for side in (y.keys, y.values)} == {CONTEXT}
    torch.testing.assert_close(packed.follow(cache, ids), logits)  # the cache is as it was
    # the same codes, read back densely, under the stock model: tokens that follow are exact
    kv = [(y.keys.unpack(), y.values.unpack()) for y in cache.layers]
    stock = subject.follow(kv, CONTEXT, ids)
    torch.testing.assert_close(logits, stock, rtol=1e-3, atol=1e-4)
    dense = [(y.k, y.v) for y in prompts(subject).layers]
    assert (stock - subject.follow(dense, CONTEXT, ids)).abs().max() > 1e-3


def test_tokens_of_embeddings_are_coded_by_kind(subject: Subject) -> None:
    options = {"visual_ratio": 4, "text_ratio": 2}
    packed = PackedRunner(setting(subject), options, False, True)
    embeddings = subject.model.get_input_embeddings()(tiny.texts(2, CONTEXT)).detach()
    embeddings[0, 10:60] += 0.1
    embeddings[1, 100:150] += 0.1
    cache = packed.prefill(Prompts(subject, embeddings))
    for layer in cache.layers:
        for side in (layer.keys, layer.values):
            kinds = side.store.side.payload[0][:, : side.store.coded, 0].bool()
            assert kinds[0].nonzero().flatten().tolist() == list(range(10, 60))
            assert kinds[1].nonzero().flatten().tolist() == list(range(100, 150))
    sizes = packed.sizes(cache)
    assert 2 < sizes.ratio < 4
    text = packed.prefill(Prompts(subject, tiny.texts(2, CONTEXT)))
    assert not text.layers[0].keys.store.side.payload[0].any()


def test_pieces_are_what_decoding_token_by_token_is(subject: Subject) -> None:
    packed = runner(subject, coded_once=False)
    cache = packed.prefill(prompts(subject))
    ids = tiny.texts(2, NEXT)
    pieces = packed.follow(cache, ids)
    grown = packed.prefill(prompts(subject))
    steps = [packed.compiled(t, past_key_values=grown).logits for t in ids.split(1, 1)]
    torch.testing.assert_close(pieces, torch.cat(steps, 1), rtol=1e-3, atol=1e-4)
    # some of what followed has been coded
    assert grown.layers[0].keys.store.coded == CONTEXT - RECENT + NEXT - 32
    kv = [(y.keys.unpack(), y.values.unpack()) for y in cache.layers]
    assert (pieces - subject.follow(kv, CONTEXT, ids)).abs().max() > 1e-3


def test_sizes_count_everything(subject: Subject) -> None:
    packed = runner(subject)
    cache = packed.prefill(prompts(subject))
    sizes = packed.sizes(cache)
    sides = [side for y in cache.layers for side in (y.keys, y.values)]
    per_token = sum(side.store.ref.layout.token_bytes(torch.float32) for side in sides)
    assert sizes.token_bytes == per_token
    assert sizes.ratio == 2 * 32 * len(sides) / per_token >= 4
    # one sequence, 16-bit: codes of all slots, 12 pool slots with positions, 64 + 32 ring slots
    slots = sides[0].store.side.capacity
    exact = len(sides) * 2 * 32 * (12 + RECENT + 32) + len(sides) * 12 * 8 / 2
    dense = len(sides) * 2 * 32 * CONTEXT
    assert sizes.whole_ratio == pytest.approx(dense / (slots * per_token + exact))
    assert 1 < sizes.whole_ratio < sizes.ratio
    assert sizes.model_bytes > 0


def test_tokens_kept_exact_beyond_the_sinks_are_counted(subject: Subject) -> None:
    packed = runner(subject)
    cache = packed.prefill(prompts(subject))
    before = packed.sizes(cache)
    store = cache.layers[0].keys.store
    store.side.pool_positions[:, SINKS] = 77  # one token of each sequence, in one of four sides
    after = packed.sizes(cache)
    coded = CONTEXT - RECENT - SINKS
    assert after.token_bytes == pytest.approx(before.token_bytes + 2 * 32 / coded)
    assert after.ratio < before.ratio


def test_bases_of_single_sequences_are_counted(subject: Subject) -> None:
    packed = runner(subject, codec="svd")
    cache = packed.prefill(prompts(subject))
    sizes = packed.sizes(cache)
    rank, coded = 32 // 4, CONTEXT - RECENT - SINKS
    bases = sum(s.store.ref.cache_bytes for y in cache.layers for s in (y.keys, y.values))
    assert bases >= 2 * 2 * subject.layers * 32 * rank * 2  # of two sequences
    assert sizes.token_bytes == pytest.approx(2 * subject.layers * rank * 2 + bases / 2 / coded)
    assert sizes.ratio < 4
    assert packed.fitted_for == 0


def test_prompts_of_several_lengths_share_their_graphs(subject: Subject) -> None:
    lengths = (CONTEXT, 320, 2 * CONTEXT)
    packed = PackedRunner(setting(subject, *lengths), {"ratio": 4}, False, True)
    for length in lengths:
        cache = packed.prefill(Prompts(subject, tiny.texts(2, length)))
        packed.follow(cache, tiny.texts(2, 32))
    graphs = apack_compile.report(subject.model).graph_reports
    assert len(graphs) == 3  # the calibration prompt, prompts in pairs, what follows


def test_codes_fitted_beforehand_need_no_prefill_to_learn_from(subject: Subject) -> None:
    packed = PackedRunner(setting(subject), {"ratio": 4}, beforehand=True, coded_once=True)
    packed.follow(packed.prefill(prompts(subject)), tiny.texts(2, 32))
    runs = [run for g in apack_compile.report(subject.model).graph_reports for run in g.runs]
    assert runs == [("encode", 1), ("decode", 2)]
    notes = packed.notes()
    assert (notes["fitted"], notes["fitted_for"]) == ("beforehand", CONTEXT)


@pytest.mark.parametrize("left", [(256, 320, 512), (320, 512), (512,), (512, 256)])
def test_what_codes_learn_from_does_not_depend_on_which_cells_are_left(
    subject: Subject, left: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: it was a prompt as long as the first context still to measure, then longer ones."""
    asked: list[int] = []

    def calibration(self: Setting, length: int) -> list[dict[str, torch.Tensor]]:
        asked.append(length)
        return [{"input_ids": self.prompts[:, :length]}]

    monkeypatch.setattr(Setting, "calibration", calibration)
    packed = PackedRunner(setting(subject, 256, 320, 512), {"ratio": 4}, False, True)
    for length in left:
        packed.prefill(Prompts(subject, tiny.texts(2, length)))
    assert asked == [320]  # twice that is beyond 512 + 96, twice 256 is not
    assert packed.notes()["fitted_for"] == 320


@pytest.mark.parametrize(
    ("contexts", "expected"),
    [((1024,), 1024), ((2048, 4096, 7680), 4096), ((7680, 4096), 4096), ((2048, 7680), 7680)],
)
def test_codes_of_one_prompt_reach_the_end_of_the_longest_context(
    contexts: tuple[int, ...], expected: int
) -> None:
    prompts = torch.zeros(6, max(contexts))
    made = Setting(None, prompts, 512, "eager", contexts)  # type: ignore[arg-type]
    assert made.learnt_from == expected
    assert made.many_lengths == (len(contexts) > 1)


@pytest.mark.parametrize(("tokens", "expected"), [(2048, 2048), (3072, 2048), (7680, 4096)])
def test_codes_reach_as_far_as_is_wanted(tokens: int, expected: int) -> None:
    made = Setting(None, torch.zeros(6, tokens), 512, "eager", (tokens,))  # type: ignore[arg-type]
    assert [batch["input_ids"].shape for batch in fitted_on(made)] == [(1, expected)] * 6
    assert max(2 * expected, 4096) >= tokens + 512


def test_codes_that_lose_nothing_are_not_taken_for_codes(subject: Subject) -> None:
    packed = PackedRunner(setting(subject), {"codec": "exact"}, False, True)
    with pytest.raises(RuntimeError, match="not coded: attentionpack"):
        packed.prefill(prompts(subject))


@pytest.mark.parametrize("beforehand", [False, True])
def test_codes_without_their_sensitivity_are_not_measured(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, beforehand: bool
) -> None:
    """Bug: where several fits shared a GPU, memory ran out, and worse codes were measured."""
    monkeypatch.setattr(Studies, "sense", lambda *_: "out of memory")
    with pytest.raises(RuntimeError, match=r"sensitivity .*not measured.*out of memory"):
        made = PackedRunner(setting(subject), {"ratio": 4}, beforehand, True)
        made.prefill(prompts(subject))


def test_an_option_that_is_not_there_leaves_the_method_out(subject: Subject) -> None:
    with pytest.raises(Unavailable, match="no option 'colour'"):
        runner(subject, colour="blue")


def test_lengths_that_are_not_whole_pieces_are_refused(subject: Subject) -> None:
    packed = runner(subject)
    with pytest.raises(ValueError, match="17 tokens: accepted are multiples of 16"):
        packed.follow(DynamicCache(), tiny.texts(1, 17))
