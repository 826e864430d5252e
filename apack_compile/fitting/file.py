"""Profiles on disk: safetensors with a JSON header, versioned and checksummed.

    metadata   format, version, header (JSON text), sha256
    tensors    layers.0.k.0, layers.0.k.1, ...      parameters of the code of the keys, as fitted
               layers.0.v.0, ...                    of the values
               layers.0.rotation.frequencies, ...   of the keys by position, where it is known

The checksum covers the header and names, dtypes, shapes and bytes of all tensors. Parameters keep
the dtype that they have in memory: what is loaded codes bit for bit like what was fitted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..codec import Code, Layout, parse_layout
from ..codec.rotation import Rotation
from .fingerprint import fingerprint

FORMAT, VERSION = "attentionpack profile", 2


class ProfileError(ValueError):
    """A profile cannot be used; says why."""


@dataclass(frozen=True)
class SavedLayer:
    """One layer of a profile.

    Attributes:
        weight: digest of the projection weight that its keys are made with.
        shape: of that weight.
        name: of that weight in the model, if the model was there when the profile was saved.
        codes: of keys and values.
        rotation: of the keys by position, if known.
        reach: tokens of context that the codes serve.
        reason: what is not as it should be, for the report.
    """

    weight: str
    shape: tuple[int, ...]
    name: str
    codes: tuple[Code, Code]
    rotation: Rotation | None
    reach: int
    reason: str


@dataclass(frozen=True)
class SavedProfile:
    """Fitted codes of layers under one set of options: of one graph, or of a model's graphs.

    Attributes:
        options: what codes depend on, as text.
        weights: digests of all weights that the layers depend on.
        layers: in the order of the graph.
        tokens: that the codes were fitted on.
        visual: how many of them are visual; None: not known.
        made: versions and time of the fit.
    """

    options: str
    weights: tuple[str, ...]
    layers: tuple[SavedLayer, ...]
    tokens: int
    visual: int | None
    made: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """Of the weights."""
        return fingerprint(self.weights)

    def named(self, names: Mapping[str, str]) -> SavedProfile:
        """The same with names of weights by their digests."""
        layers = tuple(replace(x, name=names.get(x.weight, x.name)) for x in self.layers)
        return replace(self, layers=layers)

    @classmethod
    def joined(cls, profiles: Sequence[SavedProfile]) -> SavedProfile:
        """One profile with the layers of all of these, which have the same options."""
        most = max(profiles, key=lambda profile: profile.tokens)
        weights = tuple(dict.fromkeys(w for p in profiles for w in p.weights))
        return replace(most, weights=weights, layers=tuple(x for p in profiles for x in p.layers))


def write_profile(profile: SavedProfile, path: Path) -> None:
    """Write ``profile`` to ``path``: whole, or not at all.

    Raises:
        OSError: the folder is not there, is read-only, or is full.
    """
    tensors: dict[str, Tensor] = {}
    layers = [_layer_header(x, f"layers.{i}", tensors) for i, x in enumerate(profile.layers)]
    header = json.dumps(
        {
            "options": profile.options, "fingerprint": profile.fingerprint,
            "weights": profile.weights, "layers": layers, "tokens": profile.tokens,
            "visual": profile.visual, "made": dict(profile.made),
        }
    )  # fmt: skip
    metadata = {
        "format": FORMAT, "version": str(VERSION), "header": header,
        "sha256": _checksum(header, tensors),
    }  # fmt: skip
    data = safetensors.torch.save(tensors, metadata)
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def read_profile(path: Path) -> SavedProfile:
    """The profile in a file.

    Raises:
        OSError: the file is not there, or may not be read.
        ProfileError: it is no profile, of another version, or damaged.
    """
    path.stat()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ProfileError("it is no profile of attentionpack")
            if metadata.get("version") != str(VERSION):
                raise ProfileError(
                    f"it has version {metadata.get('version')} of the format; this is {VERSION}"
                )
            # Copies: the file may be replaced while they are in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ProfileError(f"it is damaged ({error})") from error
    header = metadata.get("header", "")
    if metadata.get("sha256") != _checksum(header, tensors):
        raise ProfileError("it is damaged (its checksum is another)")
    try:
        return _profile_of(json.loads(header), tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ProfileError(f"its header and tensors do not fit together ({error})") from error


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _layer_header(layer: SavedLayer, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What JSON can hold of a layer; its tensors go into ``tensors``."""
    header: dict[str, Any] = {
        "weight": layer.weight, "shape": layer.shape, "name": layer.name, "reach": layer.reach,
        "reason": layer.reason, "rotation": None,
    }  # fmt: skip
    for side, code in zip("kv", layer.codes, strict=True):
        header[side] = {"layout": code.layout.spec, "error": code.error, "kinds": code.kinds}
        for i, parameter in enumerate(code.params):
            tensors[f"{prefix}.{side}.{i}"] = _on_host(parameter)
    if layer.rotation is not None:
        rest = {}
        for field in fields(layer.rotation):
            value = getattr(layer.rotation, field.name)
            if isinstance(value, Tensor):
                tensors[f"{prefix}.rotation.{field.name}"] = _on_host(value)
            else:
                rest[field.name] = value
        header["rotation"] = rest
    return header


def _on_host(tensor: Tensor) -> Tensor:
    """A copy: safetensors refuses tensors that share storage."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _profile_of(header: Any, tensors: Mapping[str, Tensor]) -> SavedProfile:
    layers = tuple(
        _layer_of(layer, f"layers.{i}.", tensors) for i, layer in enumerate(header["layers"])
    )
    visual = header["visual"]
    profile = SavedProfile(
        str(header["options"]), tuple(map(str, header["weights"])), layers,
        int(header["tokens"]), None if visual is None else int(visual),
        {str(k): str(v) for k, v in header["made"].items()},
    )  # fmt: skip
    if profile.fingerprint != header["fingerprint"]:
        raise ValueError("the fingerprint is not that of the weights")
    return profile


def _layer_of(header: Any, prefix: str, tensors: Mapping[str, Tensor]) -> SavedLayer:
    codes = []
    for side in "kv":
        layout = parse_layout(header[side]["layout"])
        params = tuple(tensors[f"{prefix}{side}.{i}"] for i in range(layout.param_count))
        _check_shapes(layout, params)
        kinds = header[side]["kinds"]
        if kinds is not None:
            kinds = float(kinds[0]), float(kinds[1])
        codes.append(Code(layout, params, float(header[side]["error"]), kinds))
    rotation = None
    if header["rotation"] is not None:
        start = f"{prefix}rotation."
        parts = {n[len(start) :]: t for n, t in tensors.items() if n.startswith(start)}
        rotation = Rotation(**header["rotation"], **parts)
    return SavedLayer(
        str(header["weight"]), tuple(map(int, header["shape"])), str(header["name"]),
        (codes[0], codes[1]), rotation, int(header["reach"]), str(header["reason"]),
    )  # fmt: skip


def _check_shapes(layout: Layout, params: tuple[Tensor, ...]) -> None:
    """Code one token: fails unless the parameters have the shapes that the layout needs."""
    token = torch.zeros(1, layout.heads, 1, layout.dim)
    position = torch.zeros(1, 1, dtype=torch.int64) if layout.positional else None
    with torch.no_grad():
        payload = layout.encode(token, params, position)
        back = layout.decode(payload, params, token.dtype, position)
    widths = [w for w, _ in layout.payload_fields(token.dtype)]
    if [p.shape[-1] for p in payload] != widths or back.shape != token.shape:
        raise ValueError(f"parameters do not have the shapes of {layout.spec}")
