"""``save_profile`` and ``load_profile``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import apack_compile
from apack_compile import ProfileError
from apack_compile.fitting.file import read_profile, write_profile
from apack_compile.fitting.layer import PROFILES

from .. import zoo
from .profiles import saved

OPTIONS = {"ratio": 8, "inner": "eager", "profile_cache": False}


def fitted(**changes: Any) -> Any:
    """A model whose codes were learned from a prompt of 401 tokens."""
    case = zoo.llama(text=400, **changes)
    prefill(case.model)
    return case.model


def prefill(model: Any, **options: Any) -> Any:
    compiled = torch.compile(model, backend="attentionpack", options={**OPTIONS, **options})
    return compiled(**zoo.llama(text=400).inputs).past_key_values


def ran(model: Any) -> list[dict[str, int]]:
    return [dict(g.runs) for g in apack_compile.report(model).graph_reports]


def forget() -> None:
    torch._dynamo.reset()
    PROFILES.clear()


def test_codes_are_carried_to_the_same_weights_elsewhere(tmp_path: Path) -> None:
    model, path = fitted(), tmp_path / "codes.safetensors"
    (codes,) = PROFILES.of_weight(model.model.layers[0].self_attn.k_proj.weight).values()
    info = apack_compile.save_profile(model, path)
    assert (info.path, info.layers, info.tokens, info.foreign) == (path, 2, 397, 0)
    assert "ratio=8.0" in info.options and set(info.made) == {"attentionpack", "torch", "time"}
    assert [layer.name for layer in read_profile(path).layers] == [
        f"model.layers.{i}.self_attn.k_proj.weight" for i in range(2)
    ]
    forget()
    twin = zoo.llama().model
    compiled = torch.compile(twin, backend="attentionpack", options=OPTIONS)
    assert apack_compile.load_profile(compiled, path) == info
    cache = prefill(twin)
    assert ran(twin) == [{"encode": 1}]
    (graph,) = apack_compile.report(twin).graph_reports
    assert graph.profile == f"loaded from {path}, fitted on 397 tokens"
    for mine, theirs in zip(
        codes.codes or (), (cache.layers[0].keys, cache.layers[0].values), strict=True
    ):
        for a, b in zip(mine.code.params, theirs.store.ref.code.params, strict=True):
            assert torch.equal(a, b)


def test_what_was_loaded_can_be_saved_again(tmp_path: Path) -> None:
    model = fitted()
    apack_compile.save_profile(model, tmp_path / "a.safetensors")
    forget()
    apack_compile.load_profile(model, tmp_path / "a.safetensors")
    apack_compile.save_profile(model, tmp_path / "b.safetensors")
    first, second = ((tmp_path / f"{n}.safetensors").read_bytes() for n in "ab")
    assert len(first) == len(second)
    assert read_profile(tmp_path / "a.safetensors").weights == (
        read_profile(tmp_path / "b.safetensors").weights
    )


def test_a_file_of_the_cache_folder_can_be_loaded(_cache_folder: Path) -> None:
    model = zoo.llama().model
    prefill(model, profile_cache=True)
    (path,) = _cache_folder.rglob("*.safetensors")
    forget()
    assert apack_compile.load_profile(model, path).layers == 2
    prefill(model)
    assert ran(model) == [{"encode": 1}]


def test_other_weights_are_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    model, path = fitted(), tmp_path / "codes.safetensors"
    apack_compile.save_profile(model, path)
    forget()
    model.model.layers[1].mlp.up_proj.weight.data += 1e-3
    expected = (
        f"{path} cannot be loaded: it belongs to other weights: 1 of 16 are not in this model; "
        "strict=False uses it nevertheless"
    )
    with pytest.raises(ProfileError, match=re.escape(expected)):
        apack_compile.load_profile(model, path)
    prefill(model)
    assert ran(model) == [{"fit": 1}]


def test_with_strict_off_layers_are_found_by_name(tmp_path: Path) -> None:
    path = tmp_path / "codes.safetensors"
    apack_compile.save_profile(fitted(), path)
    forget()
    tuned = zoo.llama().model
    for parameter in tuned.parameters():
        parameter.data += 1e-3
    info = apack_compile.load_profile(tuned, path, strict=False)
    assert (info.layers, info.foreign) == (2, 15), "all but the rotary frequencies, shared by both"
    prefill(tuned)
    assert ran(tuned) == [{"encode": 1}]


def test_with_strict_off_names_and_shapes_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "codes.safetensors"
    apack_compile.save_profile(fitted(), path)
    for changes, words in (
        (
            {"num_key_value_heads": 1},
            "'model.layers.0.self_attn.k_proj.weight' is (32, 64) in the file, (16, 64)",
        ),
        (
            {"num_hidden_layers": 1},
            "the model has no weight 'model.layers.1.self_attn.k_proj.weight'",
        ),
    ):
        other = zoo.llama(**changes).model
        with pytest.raises(ProfileError, match=re.escape(words)):
            apack_compile.load_profile(other, path, strict=False)
    nameless = saved(1).named({saved(1).layers[0].weight: ""})
    write_profile(nameless, path)
    with pytest.raises(ProfileError, match="it has no names of weights"):
        apack_compile.load_profile(zoo.llama().model, path, strict=False)


def test_codes_for_other_heads_are_found_at_the_first_prompt(tmp_path: Path) -> None:
    """The key projection has the shape of the file's, but two heads of 16 are one of 32."""
    path = tmp_path / "codes.safetensors"
    apack_compile.save_profile(fitted(), path)
    forget()
    other = zoo.llama(num_attention_heads=2, num_key_value_heads=1).model
    apack_compile.load_profile(other, path, strict=False)
    with pytest.raises(ProfileError, match="codes for 2 heads of 16 were loaded for a layer with"):
        prefill(other)


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "codes.safetensors"
    write_profile(saved(), path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ProfileError, match=re.escape(f"{path} cannot be loaded: it is damaged")):
        apack_compile.load_profile(zoo.llama().model, path)
    with pytest.raises(FileNotFoundError):
        apack_compile.load_profile(zoo.llama().model, tmp_path / "none")


def test_a_model_without_codes_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no codes have been fitted for this model: run a"):
        apack_compile.save_profile(zoo.llama().model, tmp_path / "x")
    model = fitted()
    with pytest.raises(ProfileError, match=r"for this model and the options .*ratio=4"):
        apack_compile.save_profile(model, tmp_path / "x", {"ratio": 4})
    assert not (tmp_path / "x").exists()


def test_codes_for_two_sets_of_options_are_told_apart(tmp_path: Path) -> None:
    model = fitted()
    prefill(model, ratio=4)
    with pytest.raises(ProfileError, match=r"several sets of options .*ratio=4.*ratio=8"):
        apack_compile.save_profile(model, tmp_path / "x")
    info = apack_compile.save_profile(model, tmp_path / "x", {"ratio": 4})
    assert "ratio=4.0" in info.options


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for call in (apack_compile.save_profile, apack_compile.load_profile):
        with pytest.raises(TypeError, match=r"model='llama': accepted is an nn\.Module"):
            call("llama", tmp_path / "x")  # type: ignore[operator]
