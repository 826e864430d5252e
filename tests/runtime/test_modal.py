"""Visual and text tokens of a prompt with a budget for each, through the backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import apack_compile
from apack_compile import PackedKV, visual_tokens
from apack_compile.cache import SideStore
from apack_compile.codec import ModalLayout

from .. import zoo

WINDOW = 16
OPTIONS = {
    "visual_ratio": 6, "inner": "eager", "fit_tokens": 64, "window": WINDOW, "profile_cache": False,
}  # fmt: skip

FAMILIES = {
    "llava": lambda **how: zoo.llava(side=112, **how),  # 64 visual tokens
    "qwen2_vl": lambda **how: zoo.qwen2_vl(grid=12, **how),  # 36
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def compiled(model: Any, **changes: Any) -> Any:
    return torch.compile(model, backend="attentionpack", options={**OPTIONS, **changes})


def prefilled(model: Any, inputs: dict[str, Tensor]) -> Any:
    cache = transformers.DynamicCache()
    model(**inputs, past_key_values=cache)
    return cache


def stores(cache: Any) -> list[SideStore]:
    """Of keys and values of all layers."""
    found = []
    for layer in cache.layers:
        for side in (layer.keys, layer.values):
            assert isinstance(side, PackedKV) and side.store is not None
            found.append(side.store)
    return found


def kinds(store: SideStore) -> Tensor:
    """Of the coded tokens, ``[B, S]`` bool: which were coded as visual ones."""
    assert isinstance(store.ref.layout, ModalLayout)
    return store.ref.layout.kinds_of(store.side.payload[0][:, : store.coded, 0]) == 1


def notes(model: Any) -> dict[str, str]:
    graphs = apack_compile.report(model).graph_reports
    return {name: reason for graph in graphs for name, reason in graph.notes}


def runs(model: Any, what: str) -> int:
    graphs = apack_compile.report(model).graph_reports
    return sum(count for graph in graphs for name, count in graph.runs if name == what)


def images(case: zoo.Case) -> Tensor:
    return case.inputs["input_ids"] == zoo.IMAGE


def marked(batch: int, tokens: int, *runs: tuple[int, int]) -> Tensor:
    """``[B, S]`` bool: from where and how many tokens of each row are visual."""
    here = torch.arange(tokens)
    rows = [(here >= start) & (here < start + count) for start, count in runs]
    return torch.stack(rows) if rows else torch.zeros(batch, tokens, dtype=torch.bool)


@every_family
@torch.no_grad()
def test_tokens_of_an_image_are_coded_at_their_own_ratio(family: str) -> None:
    case = FAMILIES[family](batch=2, padded=True, text=200)
    ours = compiled(case.model)
    coded = case.inputs["input_ids"].shape[1] - WINDOW
    dense = transformers.DynamicCache()
    case.model(**case.inputs, past_key_values=dense)
    counts = []
    for what in ("fit", "encode"):  # packed by the runtime behind the fit, then by the graph
        cache = prefilled(ours, case.inputs)
        assert runs(case.model, what) == 1
        for number, store in enumerate(stores(cache)):
            assert torch.equal(kinds(store), images(case)[:, :coded])
            layer = dense.layers[number // 2]
            x = (layer.values if number % 2 else layer.keys)[:, :, :coded]
            levels = images(case)[:, :coded].to(torch.uint8)
            layout, params = store.ref.layout, store.ref.code.params
            want = layout.decode(layout.encode(x, params, None, levels), params, x.dtype)
            got = store.dense(coded)
            pooled = (store.side.pool_positions[:, :, None] == torch.arange(coded)).any(1)
            counts.append(int((kinds(store) & ~pooled).sum()))
            off = (got - want).abs().amax((1, 3)).masked_fill(pooled, 0)  # [B, S]
            # Rounding may carry a component over the border of two levels.
            assert (off > 1e-4).float().mean() < 0.02
    report = apack_compile.report(case.model)
    text, visual = report.by_kind
    assert visual.tokens == sum(counts[4:]) / 4, "the first cache is gone"
    assert visual.ratio == pytest.approx(6, rel=0.35) and visual.ratio >= 6
    assert text.ratio == pytest.approx(2, rel=0.1) and text.ratio >= 2
    line = f"by kind, in the mean over sides of layers: {visual.tokens:.1f} visual tokens coded at"
    assert line in str(report)
    assert f"{text.tokens:.1f} of text at {text.ratio:.2f}x" in str(report)
    assert "visual tokens" not in notes(case.model)
    assert apack_compile.cache_bytes(cache).packed < sum(
        4 * t.numel() for layer in dense.layers for t in (layer.keys, layer.values)
    )


@every_family
@torch.no_grad()
def test_decode_attends_to_both_kinds(family: str) -> None:
    """Against the stock model on what the caches read as; over a flush of the ring."""
    case = FAMILIES[family](text=120)
    ours = compiled(case.model)
    prefilled(ours, case.inputs)
    cache = prefilled(ours, case.inputs)
    for count in (1, 5, 30, 1, 40, 1):  # 30 and 40: dense steps of packed layers
        dense = transformers.DynamicCache()
        for number, layer in enumerate(cache.layers):
            dense.update(layer.keys.unpack(), layer.values.unpack(), number)
        ids = torch.randint(10, 190, (1, count), generator=torch.Generator().manual_seed(count))
        want = case.model(input_ids=ids, past_key_values=dense).logits
        got = ours(input_ids=ids, past_key_values=cache).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    coded = case.inputs["input_ids"].shape[1] - WINDOW
    for store in stores(cache):
        assert store.coded > coded
        assert torch.equal(kinds(store)[:, :coded], images(case)[:, :coded])
        assert not kinds(store)[:, coded:].any(), "what comes later is text"


@every_family
@torch.no_grad()
def test_generation_is_what_single_steps_are(family: str) -> None:
    case = FAMILIES[family](text=90)
    ours = compiled(case.model)
    prefilled(ours, case.inputs)
    told = ours.generate(**case.inputs, max_new_tokens=6, do_sample=False)
    cache = transformers.DynamicCache()
    token = ours(**case.inputs, past_key_values=cache).logits[:, -1:].argmax(-1)
    single = [token]
    for _ in range(5):
        token = ours(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
        single.append(token)
    assert torch.equal(told[:, case.inputs["input_ids"].shape[1] :], torch.cat(single, 1))
    assert kinds(stores(cache)[0]).any()


@torch.no_grad()
def test_a_compiled_prefill_and_its_steps_serve_every_mixture() -> None:
    """How many tokens are visual is a symbol: also where it equals another size."""
    case = zoo.llama(text=199, num_hidden_layers=1)
    ours = compiled(case.model, inner="inductor")
    mixtures = [(8, 120), (8, 0), (0, 200), (50, 3), (8, 64), (8, 100), (20, 150), (8, 92)]
    for start, count in mixtures:
        with apack_compile.visual_tokens(marked(1, 200, (start, count))):
            cache = prefilled(ours, case.inputs)
        for store in stores(cache):
            visual = min(start + count, 200 - WINDOW) - start
            assert store.kinds == (200 - WINDOW - visual, visual)
            assert int(kinds(store).sum()) == visual
        logits = ours(torch.tensor([[5]]), past_key_values=cache).logits
        assert logits.isfinite().all()
    report = apack_compile.report(case.model)
    assert (report.packed_graphs, report.recompiles) == (2, 0)
    compiles = {graph.compiles for graph in report.graph_reports if not graph.reason}
    assert compiles == {1}
    before = sum(graph.regions for graph in report.graph_reports)
    assert before <= 4, "encode of keys and of values; attention"


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_other_lengths_and_batches_compile_a_bounded_number_of_times(dynamic: bool | None) -> None:
    case = zoo.llama(num_hidden_layers=1)
    options = {**OPTIONS, "inner": "aot_eager"}
    ours = torch.compile(case.model, backend="attentionpack", options=options, dynamic=dynamic)
    shapes = [(1, 90), (1, 120), (1, 77), (2, 90), (2, 131), (3, 84), (4, 99), (5, 140), (3, 200)]
    compiles = []
    for number, (batch, text) in enumerate(shapes):
        inputs = zoo.prompt(0, text, batch, padded=batch > 1)
        generator = torch.Generator().manual_seed(number)
        mask = torch.rand(batch, text + 1, generator=generator) < 0.3 + 0.05 * number
        with apack_compile.visual_tokens(mask):
            cache = prefilled(ours, inputs)
        coded = text + 1 - WINDOW
        assert torch.equal(kinds(stores(cache)[0]), mask[:, :coded])
        ours(torch.full((batch, 1), 5), past_key_values=cache)
        graphs = apack_compile.report(case.model).graph_reports
        compiles.append(sum(graph.compiles for graph in graphs))
    assert compiles[-1] <= 8
    assert compiles[-1] == compiles[-4], "lengths, batches and mixtures are symbols by then"


EVERY: dict[str, Any] = {"text_ratio": 3, "tiers": True, "evict": 0.4, "exact_share": 0.03}


@pytest.mark.parametrize("more", [{}, EVERY], ids=str)
@torch.no_grad()
def test_inductor_gives_what_eager_operators_give(more: dict[str, Any]) -> None:
    case = FAMILIES["llava"](batch=2, padded=True, text=100)
    found = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        ours = compiled(case.model, inner=inner, **more)
        prefilled(ours, case.inputs)
        cache = prefilled(ours, case.inputs)
        steps = [
            ours(input_ids=torch.full((2, 1), 20 + i), past_key_values=cache).logits
            for i in range(40)
        ]
        found.append((stores(cache), torch.cat(steps, 1)))
    for one, two in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(kinds(one), kinds(two)) and one.rows == two.rows
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_prompt_without_an_image_is_text_and_the_report_says_so() -> None:
    case = FAMILIES["llava"](text=200)
    ours = compiled(case.model)
    prefilled(ours, case.inputs)
    ids = case.inputs["input_ids"].clamp(max=190)
    cache = prefilled(ours, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert not any(kinds(store).any() for store in stores(cache))
    reason = "none in this prompt: all tokens are coded as text, at ratio 2"
    assert notes(case.model)["visual tokens"] == reason
    assert f"visual tokens: {reason}" in str(apack_compile.report(case.model))
    cache = prefilled(ours, case.inputs)
    assert kinds(stores(cache)[0]).any()


@torch.no_grad()
def test_tokens_of_unknown_kind_are_text_and_the_report_says_why() -> None:
    """Never coarser than they might have to be."""
    case = zoo.llama(text=200)
    embeddings = case.model.get_input_embeddings()(case.inputs["input_ids"])
    ours = compiled(case.model, text_ratio=4)
    for _ in range(2):
        cache = prefilled(ours, {"inputs_embeds": embeddings})
        assert not any(kinds(store).any() for store in stores(cache))
        assert notes(case.model)["visual tokens"] == (
            "not known (embeddings that no compiled graph has made): "
            "all tokens are coded as text, at ratio 4"
        )
    (text, visual) = apack_compile.report(case.model).by_kind
    assert visual.tokens == 0 and text.ratio == pytest.approx(4, rel=0.15)


@torch.no_grad()
def test_an_image_that_comes_after_text_alone_is_fitted_once_more() -> None:
    case = FAMILIES["llava"](text=200)
    ids = case.inputs["input_ids"].clamp(max=190)
    ours = compiled(case.model)
    first = prefilled(ours, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for what, count in (("fit", 2), ("encode", 1)):
        second = prefilled(ours, case.inputs)
        assert runs(case.model, what) == count
    for blind, seen in zip(stores(first), stores(second), strict=True):
        assert blind.ref is not seen.ref
        assert isinstance(seen.ref.layout, ModalLayout)
        assert blind.ref.code.kinds is None or blind.ref.code.kinds != seen.ref.code.kinds
    assert kinds(stores(second)[0]).any()


@torch.no_grad()
def test_rows_of_a_batch_may_have_different_mixtures() -> None:
    """A sequence reads as it does alone, whatever the others have."""
    case = zoo.llama(batch=3, text=199, num_hidden_layers=1)
    mask = marked(3, 200, (8, 150), (0, 0), (100, 40))
    ours = compiled(case.model)
    with apack_compile.visual_tokens(mask):
        prefilled(ours, case.inputs)
        both = prefilled(ours, case.inputs)
    for row in range(3):
        inputs = {name: x[row : row + 1] for name, x in case.inputs.items()}
        with apack_compile.visual_tokens(mask[row]):
            alone = prefilled(ours, inputs)
        for one, all_ in zip(stores(alone), stores(both), strict=True):
            assert torch.equal(kinds(one)[0], kinds(all_)[row])
            mine, theirs = one.dense(200)[0], all_.dense(200)[row]
            assert ((mine - theirs).abs().amax((0, 2)) > 1e-4).float().mean() < 0.02
    assert stores(both)[0].kinds == (200 - WINDOW, 150)


@torch.no_grad()
def test_keys_may_be_coded_before_their_rotation() -> None:
    case = FAMILIES["llava"](text=150)
    ours = compiled(case.model, k_code="pre-rope")
    prefilled(ours, case.inputs)
    cache = prefilled(ours, case.inputs)
    store = stores(cache)[0]
    assert store.ref.layout.positional and not stores(cache)[1].ref.layout.positional
    assert torch.equal(kinds(store), images(case)[:, : store.coded])
    dense = transformers.DynamicCache()
    for number, layer in enumerate(cache.layers):
        dense.update(layer.keys.unpack(), layer.values.unpack(), number)
    ids = torch.tensor([[7]])
    want = case.model(input_ids=ids, past_key_values=dense).logits
    got = ours(input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_prompt_in_two_parts_is_text_from_the_second_on() -> None:
    case = zoo.llama(text=199, num_hidden_layers=1)
    ours = compiled(case.model)
    ids = case.inputs["input_ids"]
    with apack_compile.visual_tokens(torch.ones(1, 150, dtype=torch.bool)):
        for _ in range(2):
            cache = prefilled(ours, {"input_ids": ids[:, :150]})
        ours(ids[:, 150:], past_key_values=cache)
    for store in stores(cache):
        assert store.coded == 200 - WINDOW
        assert kinds(store)[0].tolist() == [True] * (150 - WINDOW) + [False] * 50


@torch.no_grad()
def test_codes_are_found_again_on_disk_and_carried_to_another_process(tmp_path: Path) -> None:
    case, path = FAMILIES["llava"](text=200), tmp_path / "codes.safetensors"
    first = stores(prefilled(compiled(case.model, profile_cache=True), case.inputs))
    info = apack_compile.save_profile(case.model, path)
    assert "visual_ratio=6.0" in info.options
    torch._dynamo.reset()  # forgets all codes
    again = stores(prefilled(compiled(case.model, profile_cache=True), case.inputs))
    torch._dynamo.reset()
    apack_compile.load_profile(case.model, path)
    loaded = stores(prefilled(compiled(case.model), case.inputs))
    assert runs(case.model, "fit") == 0
    for a, b, c in zip(first, again, loaded, strict=True):
        assert a.ref.layout == b.ref.layout == c.ref.layout
        assert a.ref.code.kinds == b.ref.code.kinds == c.ref.code.kinds
        for mine, found, brought in zip(*(x.ref.code.params for x in (a, b, c)), strict=True):
            assert torch.equal(mine, found) and torch.equal(mine, brought)
        assert torch.equal(b.side.payload[0], c.side.payload[0])


@torch.no_grad()
def test_samples_with_images_are_fitted_by_kind() -> None:
    case = FAMILIES["qwen2_vl"](text=200)
    summary = apack_compile.fit(case.model, [case.inputs] * 2, OPTIONS, measure=False)
    (reason,) = summary.reasons
    assert reason == "the code of visual tokens has the basis of all: 68 of 128 tokens seen"
    cache = prefilled(compiled(case.model), case.inputs)
    assert runs(case.model, "encode") == 1
    for store in stores(cache):
        assert torch.equal(kinds(store), images(case)[:, : store.coded])
        assert store.ref.code.kinds is not None


@torch.no_grad()
def test_a_prediction_is_the_cache_that_the_next_prompt_makes() -> None:
    case = zoo.llama(batch=3, text=399)
    ours = compiled(case.model)
    for counts in ((200, 200, 200), (0, 130, 384), (0, 0, 0)):
        with apack_compile.visual_tokens(marked(3, 400, *((0, n) for n in counts))):
            for _ in range(2):
                cache = prefilled(ours, case.inputs)
        found = apack_compile.predict(case.model, batch=3, tokens=400, visual=counts)
        assert apack_compile.cache_bytes(cache) == found
        report = apack_compile.report(case.model)
        assert report.predicted_bytes == report.packed_bytes
        del cache
    same = apack_compile.predict(case.model, batch=3, tokens=400, visual=50)
    assert same == apack_compile.predict(case.model, batch=3, tokens=400, visual=[50] * 3)
    for wrong in ([1, 2], 385, -1, [0, 0, 385]):
        with pytest.raises(ValueError, match="visual="):
            apack_compile.predict(case.model, batch=3, tokens=400, visual=wrong)


@pytest.mark.parametrize("few", [0, 5], ids=["not known", "a handful"])
@torch.no_grad()
def test_codes_that_saw_hardly_a_visual_token_are_fitted_once_more(few: int) -> None:
    """Bug: such codes were kept for good, with ten times the error on visual tokens."""
    case = zoo.llama(text=199, num_hidden_layers=1)
    embed = case.model.get_input_embeddings()
    ours = compiled(case.model)

    def run(visual: int) -> SideStore:
        prompt = {"inputs_embeds": embed(case.inputs["input_ids"])}
        with visual_tokens(marked(1, 200, (20, visual))):
            return stores(prefilled(ours, prompt))[0]

    if few:
        run(few)
    else:
        prefilled(ours, {"inputs_embeds": embed(case.inputs["input_ids"])})
    assert runs(case.model, "fit") == 1
    again = run(5)  # too few to fit on, and the codes that there are serve
    assert runs(case.model, "fit") == 2 and again.ref.layout.plane_kinds
    seen = run(100)
    assert runs(case.model, "fit") == 3 and again.ref is not seen.ref
    assert run(100).ref is seen.ref and runs(case.model, "fit") == 3
    wanted = "the code of visual tokens has the basis of all: 10"
    assert any(wanted in reason for reason in notes(case.model).values())


@pytest.mark.parametrize(
    "visual",
    [torch.ones(1, 9, dtype=torch.bool), torch.ones(2, 9), torch.ones(2, 8, dtype=torch.bool)],
    ids=["one row", "float", "short"],
)
def test_what_marks_no_token_of_a_tensor_is_refused(visual: Tensor) -> None:
    with pytest.raises(ValueError, match=r"accepted is a bool tensor \(2, 9\)"):
        PackedKV.pack(torch.randn(2, 1, 9, 4), visual=visual)
