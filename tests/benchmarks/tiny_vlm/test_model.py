from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.tiny_vlm import adapter
from benchmarks.tiny_vlm.contexts import contexts
from benchmarks.tiny_vlm.forward import embed, pixels, see, speak, understand
from benchmarks.tiny_vlm.model import Sizes, build, merge, trained, unchanged
from benchmarks.tiny_vlm.schedule import Budget
from benchmarks.tiny_vlm.scoring import exact, follow, forget, prefill
from benchmarks.tiny_vlm.trainer import Trainer

from ... import versions
from ..tiny import tokenizer
from . import small


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = contexts(small.painter(), small.prompter(), "which", 256, range(2))
    return batch.ids, batch.tiles, batch.places(small.prompter().image_id)


@torch.no_grad()
@pytest.mark.skipif(versions.BEFORE_5, reason="the benchmarks want transformers 5")
def test_the_parts_make_the_forward_pass_of_transformers() -> None:
    model = small.model()
    ids, tiles, places = inputs()
    expected = model(input_ids=ids, pixel_values=pixels(tiles, torch.float32)).logits
    hidden = understand(model, embed(model, ids, places, see(model, tiles.flatten(0, 1))))
    positions = torch.arange(ids.numel())
    torch.testing.assert_close(speak(model, hidden, positions), expected.flatten(0, 1))


@torch.no_grad()
def test_merged_weights_do_the_same_and_unchanged_ones_are_the_decoders() -> None:
    model, decoder = small.model(), small.decoder()
    ids = torch.randint(100, 49000, (1, 20), generator=torch.Generator().manual_seed(0))
    changed = model(input_ids=ids).logits
    with unchanged(model):
        torch.testing.assert_close(model(input_ids=ids).logits, decoder(ids).logits)
    assert (changed - decoder(ids).logits).abs().max() > 1e-3
    merge(model)
    torch.testing.assert_close(model(input_ids=ids).logits, changed)
    assert not any(name.endswith((".up", ".down")) for name in model.state_dict())


@torch.no_grad()
def test_generate_runs_and_looks_at_the_images() -> None:
    model = small.model()
    merge(model)
    ids, tiles, _ = inputs()
    said = [
        model.generate(
            input_ids=ids, pixel_values=pixels(tiles.roll(shift, 0), torch.float32),
            attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        ) for shift in (0, 1)
    ]  # fmt: skip
    assert said[0].sequences.shape[1] == ids.shape[1] + 3
    assert not torch.equal(said[0].logits[0], said[1].logits[0])


def test_only_what_an_adapter_holds_is_trained() -> None:
    names = set(trained(small.model()))
    assert names and all(
        "vision_model" in name or "connector" in name or name.endswith((".up", ".down"))
        for name in names
    )


@torch.no_grad()
def test_an_adapter_comes_back_as_it_was_rounded(tmp_path: Path) -> None:
    model, path = small.model(), tmp_path / "adapter.safetensors"
    adapter.save(model, small.SIZES, path)
    assert adapter.sizes_of(path) == small.SIZES
    back = build(small.decoder(), tokenizer(), small.SIZES, seed=9)
    adapter.restore(back, path)
    for name, value in trained(model).items():
        got = trained(back)[name]
        if value.ndim < 2:
            assert torch.equal(got, value), name
            continue
        codes, scale = adapter.rounded(value)
        shape = (-1, *[1] * (value.ndim - 1))
        assert torch.equal(got, codes.float() * scale.view(shape)), name
        half = (scale / 2 * 1.001).view(shape)
        assert ((got - value).abs() <= half).all(), name


@torch.no_grad()
def test_an_adapter_that_is_damaged_or_for_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    adapter.save(small.model(), small.SIZES, path)
    model = build(
        small.decoder(), tokenizer(), Sizes(hidden=48, inner=64, layers=1, heads=2, rank=2)
    )
    before = {name: value.clone() for name, value in trained(model).items()}
    with pytest.raises(adapter.AdapterError, match=r"for other sizes: .* is \[.*\], and the model"):
        adapter.restore(model, path)
    deeper = build(
        small.decoder(), tokenizer(), Sizes(hidden=32, inner=64, layers=2, heads=2, rank=2)
    )
    with pytest.raises(adapter.AdapterError, match="for another model: 16 names"):
        adapter.restore(deeper, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(adapter.AdapterError, match="another SHA-256 than it says"):
        adapter.restore(small.model(), path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(adapter.AdapterError, match="is damaged, or no adapter"):
        adapter.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(adapter.AdapterError, match="does not say its sizes"):
        adapter.load(path)
    for name, value in trained(model).items():
        assert torch.equal(value, before[name])


@torch.no_grad()
def test_an_adapter_is_published_with_its_checksum(tmp_path: Path) -> None:
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    adapter.save(small.model(), small.SIZES, old)
    save_file(load_file(old), old, {"sizes": json.dumps(asdict(small.SIZES))})
    adapter.publish(old, new)
    with safe_open(new, "pt") as file:
        assert file.metadata()["sha256"] == adapter.checksum(load_file(old))
    adapter.restore(small.model(), old)
    adapter.restore(small.model(), new)


def test_a_missing_adapter_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"README\.md"):
        adapter.load(tmp_path / "none.safetensors")


@torch.no_grad()
def test_scores_behind_a_cache_are_those_without_one() -> None:
    model = small.model()
    batch = contexts(small.painter(), small.prompter(), "which", 256, range(2))
    kv = prefill(model, batch)
    start = batch.ids.shape[1]
    predicted = follow(model, kv, start, batch.following)
    whole = torch.cat([batch.ids, batch.following], 1)
    full = model(input_ids=whole, pixel_values=pixels(batch.tiles, torch.float32)).logits
    assert torch.equal(predicted, full[:, start:].argmax(-1))
    half = forget(kv, torch.Generator().manual_seed(0))
    assert half[0][0].shape[2] == 4 + (start - 4) // 2
    assert torch.equal(half[1][1][:, :, :4], kv[1][1][:, :, :4])


def test_an_answer_counts_only_if_all_of_it_is_right() -> None:
    following = torch.tensor([[5, 6, 7, 8, 9, 1]])
    spans = [[(1, 3), (4, 6)]]
    predicted = torch.tensor([[6, 7, 0, 9, 1, 0]])
    assert exact(predicted, following, spans) == [1.0]
    predicted[0, 4] = 2
    assert exact(predicted, following, spans) == [0.5]
    predicted[0, 0] = 2
    assert exact(predicted, following, spans) == [0.0]


def trainer() -> Trainer:
    return Trainer(
        small.PLAN, small.decoder(), tokenizer(), small.painter(), torch.device("cpu")
    )  # fmt: skip


@torch.enable_grad()
def test_a_training_that_stopped_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    budget, path = Budget(steps=6), tmp_path / "checkpoint.pt"
    straight, stopped = trainer(), trainer()
    before = {name: value.clone() for name, value in trained(straight.model).items()}
    assert straight.run(budget, lambda: False, print)
    for left in (2, 2, 1):  # stops within the first stage, and twice within the second
        steps = iter([False] * left + [True])
        assert not stopped.run(budget, lambda steps=steps: next(steps), print)
        stopped.save(path)
        stopped = trainer()
        stopped.resume(path)
    assert (stopped.stage, stopped.step) == (1, 2)
    assert stopped.run(budget, lambda: False, print)
    after = trained(straight.model)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    for name, value in trained(stopped.model).items():
        assert torch.equal(value, after[name]), name
