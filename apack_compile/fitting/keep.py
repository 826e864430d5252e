"""Codes of a graph's layers from and to the folder of profiles."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..codec import CodeRef, ExactLayout
from ..options import Options
from ..passes.find_updates import CachedSite
from ..passes.find_weights import find_weights
from .file import SavedLayer, SavedProfile
from .fingerprint import digests, fingerprint
from .folder import find_profile, keep_profile
from .layer import Fit, LayerProfile, Origin

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """By what the layers of a graph are known in other processes.

    Attributes:
        weights: digests of all weights that the caches depend on.
        layers: digest of the projection weight of each layer's keys.
        shapes: of these.
    """

    weights: tuple[str, ...]
    layers: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def identify(
    graph: fx.Graph, sites: Sequence[CachedSite], value: Callable[[fx.Node], Any]
) -> Identity | str:
    """The identity of the layers of ``sites``, or why there is none.

    Args:
        graph: the Dynamo graph.
        sites: whose caches are packed.
        value: the tensor that an input or attribute of the graph is.
    """
    nodes = find_weights(graph, tuple(sites))
    projections = [site.k.weight for site in sites]
    if not nodes or None in projections:
        return "the graph does not show the weights that make its keys"
    tensors: list[Tensor] = [value(n) for n in nodes]
    try:
        known = dict(zip(nodes, digests(tensors), strict=True))
    except (RuntimeError, NotImplementedError) as error:
        return f"the weights have no fingerprint: {error}"
    named = [n for n in projections if n is not None]
    return Identity(
        tuple(known.values()),
        tuple(known[n] for n in named),
        tuple(tuple(value(n).shape) for n in named),
    )


def recall(
    profiles: Sequence[LayerProfile], identify: Callable[[], Identity | str], options: Options,
    length: int,
) -> bool:  # fmt: skip
    """Give the layers the codes that are kept on disk, if those serve ``length`` tokens.

    A layer is looked for once in a process; ``identify``, which reads all weights, is called then.
    """
    if not options.profile_cache or all(p.sought for p in profiles):
        return False
    for profile in profiles:
        profile.sought = True
    identity = identify()
    if isinstance(identity, str):
        return False
    with torch.inference_mode(False):  # codes outlive the call
        found = find_profile(fingerprint(identity.weights), repr(options.key))
    if found is None:
        return False
    path, saved = found
    if tuple(layer.weight for layer in saved.layers) != identity.layers:
        log.warning("attentionpack: the profile %s is not used: it has other layers", path)
        return False
    fits = fits_of(saved)
    if not all(fit.serves(length) for fit in fits):
        log.info("the profile %s does not reach to %d tokens", path, length)
        return False
    adopt(profiles, fits, saved, f"loaded from {path}")
    return True


def adopt(
    profiles: Sequence[LayerProfile], fits: Sequence[Fit], saved: SavedProfile, text: str
) -> None:
    """Let the layers use codes that were loaded."""
    origin = Origin(f"{text}, {_fitted_on(saved.tokens, saved.visual)}", saved)
    for profile, fit in zip(profiles, fits, strict=True):
        profile.use(fit, origin)


def fits_of(saved: SavedProfile) -> list[Fit]:
    """The codes of layers that were loaded."""
    return [
        Fit(
            (CodeRef(x.codes[0]), CodeRef(x.codes[1])),
            x.rotation,
            x.reach,
            x.reason,
            saved.tokens,
            saved.visual,
        )
        for x in saved.layers
    ]


def remember(
    profiles: Sequence[LayerProfile], identity: Identity | str, options: Options
) -> Path | None:
    """Keep the codes of a graph's layers, if all of them could be fitted; says where."""
    fits = [p.fit for p in profiles if p.fit is not None and not _is_exact(p.fit)]
    if len(fits) < len(profiles):
        return None
    path = None
    most = max(fits, key=lambda fit: fit.tokens)
    text = _fitted_on(most.tokens, most.visual)
    if isinstance(identity, str):
        origin = Origin(f"{text}, not saved: {identity}", None)
    else:
        saved = _saved(fits, identity, options, most)
        path = keep_profile(saved) if options.profile_cache else None
        origin = Origin(f"{text}, saved to {path}" if path else text, saved)
    for profile in profiles:
        profile.origin = origin
    return path


def _fitted_on(tokens: int, visual: int | None) -> str:
    kinds = f", {visual} of them visual" if visual else ""
    if visual is None:
        kinds = " (which of them are visual is not known)"
    return f"fitted on {tokens} tokens{kinds}"


def _is_exact(fit: Fit) -> bool:
    return all(ref.layout.kind == ExactLayout.kind for ref in fit.codes)


def _saved(fits: Sequence[Fit], identity: Identity, options: Options, most: Fit) -> SavedProfile:
    from .. import __version__

    layers = tuple(
        SavedLayer(
            weight, shape, "", (fit.codes[0].code, fit.codes[1].code), fit.rotation, fit.reach,
            fit.reason,
        )
        for fit, weight, shape in zip(fits, identity.layers, identity.shapes, strict=True)
    )  # fmt: skip
    made = {
        "attentionpack": __version__, "torch": torch.__version__,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    return SavedProfile(repr(options.key), identity.weights, layers, most.tokens, most.visual, made)
