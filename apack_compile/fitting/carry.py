"""``save_profile`` and ``load_profile``: carry codes to another machine, or to another model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..options import Options
from .file import ProfileError, SavedProfile, read_profile, write_profile
from .fingerprint import digests
from .keep import adopt, fits_of
from .layer import LEARNING, PROFILES, LayerProfile


@dataclass(frozen=True)
class ProfileInfo:
    """A profile that was saved or loaded.

    Attributes:
        path: of the file.
        layers: that it has codes for.
        tokens: that these were fitted on.
        options: that they depend on.
        made: versions and time of the fit.
        foreign: weights of the fit that the model does not have (only with ``strict=False``).
    """

    path: Path
    layers: int
    tokens: int
    options: str
    made: Mapping[str, str]
    foreign: int = 0


def save_profile(
    model: nn.Module, path: str | os.PathLike[str], options: Mapping[str, Any] | None = None
) -> ProfileInfo:
    """Write the codes that ``model`` has in this process to a file.

    Args:
        model: compiled or original; codes were fitted for it, or loaded.
        path: of the file; replaced if it is there.
        options: those of ``torch.compile``; may be left out if there are codes for one set only.

    Raises:
        ProfileError: there are no such codes, or several.
        OSError: the file cannot be written.
    """
    model = _original(model)
    wanted = None if options is None else repr(Options.parse(options).key)
    names: dict[Tensor, str] = {}
    found: dict[int, SavedProfile] = {}
    for name, parameter in model.named_parameters():
        for known in PROFILES.of_weight(parameter).values():
            saved = None if known.origin is None else known.origin.saved
            if saved is not None and wanted in (None, saved.options):
                found[id(saved)] = saved
                names[parameter] = name
    if len({saved.options for saved in found.values()}) != 1:
        raise ProfileError(_which(list(found.values()), wanted))
    profile = SavedProfile.joined(list(found.values()))
    profile = profile.named(dict(zip(digests(list(names)), names.values(), strict=True)))
    write_profile(profile, Path(path))
    return _info(profile, Path(path))


def _which(found: list[SavedProfile], wanted: str | None) -> str:
    if not found:
        which = f" and the options {wanted}" if wanted else ""
        return (
            f"no codes have been fitted for this model{which}: run a prompt through "
            "torch.compile(model, backend='attentionpack'), or call apack_compile.fit"
        )
    options = sorted({profile.options for profile in found})
    return (
        f"there are codes for several sets of options ({'; '.join(options)}): name one, "
        "save_profile(model, path, options)"
    )


def load_profile(
    model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True
) -> ProfileInfo:
    """Use the codes in a file for ``model``, in this process, without fitting.

    Only graphs compiled with the options of the fit use them (``ProfileInfo.options``).

    Args:
        model: compiled or original.
        path: a file that :func:`save_profile` wrote, or one of the cache folder.
        strict: every weight that the codes depend on must be in the model, bit for bit. False:
            layers are found by the names of their key projections, which must have the shapes that
            they had at the fit: codes for a model that was fine-tuned since, say.

    Raises:
        ProfileError: the file is no profile, or damaged, or of another version, or does not
            belong to this model.
        OSError: the file cannot be read.
    """
    model, path = _original(model), Path(path)
    try:
        with torch.inference_mode(False):  # codes outlive the call
            saved = read_profile(path)
        weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        own = dict(zip(weights, digests(list(weights.values())), strict=True))
        foreign = len(set(saved.weights) - set(own.values()))
        if not strict:
            names = _as_named(saved, weights)
        elif foreign:
            raise ProfileError(
                f"it belongs to other weights: {foreign} of {len(set(saved.weights))} are not in "
                "this model; strict=False uses it nevertheless"
            )
        else:
            names = _as_found(saved, own)
    except (ProfileError, RuntimeError) as error:
        raise ProfileError(f"{path} cannot be loaded: {error}") from error
    with LEARNING:
        profiles = [LayerProfile() for _ in names]
        adopt(profiles, fits_of(saved), saved, f"loaded from {path}")
        for name, profile in zip(names, profiles, strict=True):
            PROFILES.put(weights[name], saved.options, profile)
    return _info(saved, path, foreign)


def _as_found(saved: SavedProfile, own: Mapping[str, str]) -> list[str]:
    """The name of each layer's weight, by content; weights alike are taken in turn."""
    left: dict[str, list[str]] = {}
    for name, digest in own.items():
        left.setdefault(digest, []).append(name)
    names = []
    for layer in saved.layers:
        alike = left[layer.weight]
        names.append(alike.pop(0) if len(alike) > 1 else alike[0])
    return names


def _as_named(saved: SavedProfile, weights: Mapping[str, Tensor]) -> list[str]:
    """The name of each layer's weight, as saved."""
    for layer in saved.layers:
        if not layer.name:
            raise ProfileError(
                "it has no names of weights, by which strict=False finds layers: save_profile "
                "writes them"
            )
        if layer.name not in weights:
            raise ProfileError(f"the model has no weight {layer.name!r}")
        shape = tuple(weights[layer.name].shape)
        if shape != layer.shape:
            raise ProfileError(f"{layer.name!r} is {layer.shape} in the file, {shape} in the model")
    return [layer.name for layer in saved.layers]


def _original(model: nn.Module) -> nn.Module:
    """The model inside a compiled one.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: accepted is an nn.Module")
    return getattr(model, "_orig_mod", model)


def _info(profile: SavedProfile, path: Path, foreign: int = 0) -> ProfileInfo:
    return ProfileInfo(
        path, len(profile.layers), profile.tokens, profile.options, profile.made, foreign
    )
