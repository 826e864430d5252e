from __future__ import annotations

import dataclasses
import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from apack_compile.codec import Code
from apack_compile.codec.rotation import Rotation
from apack_compile.fitting import file as module
from apack_compile.fitting.file import ProfileError, SavedProfile, read_profile, write_profile

from .profiles import saved


def flat(profile: SavedProfile) -> list[Any]:
    """Everything that a profile holds, its tensors apart from one another."""
    found: list[Any] = [getattr(profile, f.name) for f in dataclasses.fields(SavedProfile)]
    found.remove(profile.layers)
    for layer in profile.layers:
        found += [layer.weight, layer.shape, layer.name, layer.reach, layer.reason]
        for code in layer.codes:
            found += [code.layout, code.error, code.kinds, *code.params]
        if layer.rotation is not None:
            found += [getattr(layer.rotation, f.name) for f in dataclasses.fields(Rotation)]
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profile.safetensors"


def metadata_of(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    start = int.from_bytes(data[:8], "little") + 8
    return json.loads(data[8:start])["__metadata__"]


def with_metadata(path: Path, **changes: str) -> None:
    """Write the file again with other metadata, the checksum as it was."""
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, {**metadata_of(path), **changes})


def test_a_profile_comes_back_bit_for_bit(path: Path) -> None:
    profile = saved()
    write_profile(profile, path)
    mine, back = flat(profile), flat(read_profile(path))
    params = sum(code.layout.param_count for layer in profile.layers for code in layer.codes)
    assert len(mine) == len(back) == 5 + 2 * 5 + 4 * 3 + params + 5
    for a, b in zip(mine, back, strict=True):
        if isinstance(a, torch.Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)
        else:
            assert type(a) is type(b) and a == b


def test_a_loaded_code_codes_like_the_fitted_one(path: Path) -> None:
    profile = saved()
    write_profile(profile, path)
    x = torch.randn(1, 2, 50, 8)
    for mine, back in zip(profile.layers, read_profile(path).layers, strict=True):
        for a, b in zip(mine.codes, back.codes, strict=True):
            for one, other in zip(
                a.layout.encode(x, a.params), b.layout.encode(x, b.params), strict=True
            ):
                assert torch.equal(one, other)


def test_half_precision_parameters_stay_half(path: Path) -> None:
    layer = saved(1).layers[0]
    halves = tuple(Code(c.layout, tuple(p.half() for p in c.params)) for c in layer.codes)
    layers = (dataclasses.replace(layer, codes=halves),)
    write_profile(dataclasses.replace(saved(1), layers=layers), path)
    for code in read_profile(path).layers[0].codes:
        assert {p.dtype for p in code.params} == {torch.float16}


def test_it_is_a_safetensors_file_that_others_can_read(path: Path) -> None:
    write_profile(saved(), path)
    tensors = safetensors.torch.load_file(path)
    codes = [code for layer in saved().layers for code in layer.codes]
    assert len(tensors) == sum(code.layout.param_count for code in codes) + 2
    assert {"layers.0.k.0", "layers.1.v.3", "layers.1.rotation.frequencies"} <= set(tensors)
    header = json.loads(metadata_of(path)["header"])
    assert [layer["name"] for layer in header["layers"]] == ["layer.0", "layer.1"]


def test_nothing_but_the_file_is_left(path: Path) -> None:
    write_profile(saved(), path)
    write_profile(saved(3), path)
    assert len(read_profile(path).layers) == 3
    assert list(path.parent.iterdir()) == [path]


def test_a_disk_that_is_full_leaves_the_old_file_and_no_other(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_profile(saved(1), path)

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_profile(saved(3), path)
    assert list(path.parent.iterdir()) == [path]
    assert len(read_profile(path).layers) == 1


def test_any_flipped_byte_is_found(path: Path) -> None:
    """In the lengths, the header of safetensors, our header, or a tensor."""
    write_profile(saved(), path)
    good = path.read_bytes()
    whole = flat(read_profile(path))
    places = [*range(0, len(good), 97), len(good) - 1]
    start = int.from_bytes(good[:8], "little") + 8
    assert sum(place >= start for place in places) > 20 and sum(8 < p < start for p in places) > 20
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        with pytest.raises(ProfileError):
            read_profile(path)
    path.write_bytes(good)
    assert len(flat(read_profile(path))) == len(whole)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_found(path: Path, kept: int) -> None:
    write_profile(saved(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ProfileError, match="it is damaged"):
        read_profile(path)


def test_an_edited_header_is_found(path: Path) -> None:
    write_profile(saved(), path)
    header = metadata_of(path)["header"].replace('"tokens": 200', '"tokens": 300')
    assert header != metadata_of(path)["header"]
    with_metadata(path, header=header)
    with pytest.raises(ProfileError, match=re.escape("it is damaged (its checksum is another)")):
        read_profile(path)


@pytest.mark.parametrize("version", ["1", "3", ""])
def test_another_version_is_named(path: Path, version: str) -> None:
    write_profile(saved(), path)
    with_metadata(path, version=version)
    with pytest.raises(ProfileError, match=f"it has version {version} of the format; this is 2"):
        read_profile(path)


def test_what_is_no_profile_is_said_to_be_none(path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"x": torch.zeros(3)}, path, metadata)
        with pytest.raises(ProfileError, match="it is no profile of attentionpack"):
            read_profile(path)


def test_a_missing_file_and_a_folder_are_the_systems_errors(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_profile(path)
    path.mkdir()
    with pytest.raises(OSError, match="os error"):
        read_profile(path)


def resealed(path: Path, change: Any) -> None:
    """Write the file again with another header, rightly checksummed."""
    tensors = safetensors.torch.load_file(path)
    header = json.loads(metadata_of(path)["header"])
    change(header, tensors)
    text = json.dumps(header)
    seal = module._checksum(text, tensors)
    metadata = {**metadata_of(path), "header": text, "sha256": seal}
    safetensors.torch.save_file(tensors, path, metadata)


def drop_tensor(header: Any, tensors: Any) -> None:
    del tensors["layers.0.k.1"]


def narrow_tensor(header: Any, tensors: Any) -> None:
    tensors["layers.0.k.1"] = tensors["layers.0.k.1"][:, :-1].contiguous()


def other_layout(header: Any, tensors: Any) -> None:
    header["layers"][0]["v"]["layout"] = "zip:heads=2,dim=8"


def drop_field(header: Any, tensors: Any) -> None:
    del header["layers"][1]["reach"]


def other_weights(header: Any, tensors: Any) -> None:
    header["weights"] = header["weights"][1:]


@pytest.mark.parametrize(
    "change",
    [drop_tensor, narrow_tensor, other_layout, drop_field, other_weights],
    ids=lambda change: change.__name__,
)
def test_a_profile_whose_parts_do_not_fit_together_is_refused(path: Path, change: Any) -> None:
    write_profile(saved(), path)
    resealed(path, lambda header, tensors: None)
    assert len(read_profile(path).layers) == 2
    resealed(path, change)
    with pytest.raises(ProfileError, match="its header and tensors do not fit together"):
        read_profile(path)


def test_names_of_weights_are_filled_in_by_content() -> None:
    profile = saved()
    named = profile.named({profile.layers[0].weight: "new.name", "unknown": "x"})
    assert [layer.name for layer in named.layers] == ["new.name", "layer.1"]
    assert named.fingerprint == profile.fingerprint
