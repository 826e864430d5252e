"""``apack_compile.predict``: the bytes of a cache before it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..accounting import CacheBytes
from ..codec.code import total_bytes
from ..fitting.layer import PROFILES, Fit, LayerProfile
from ..options import OptionError, Options
from ..runtime.stats import REGISTRY
from .sizes import PackedSide, bytes_of


def predict(
    model: nn.Module, *, batch: int, tokens: int, new_tokens: int = 0,
    options: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None,
    visual: int | Sequence[int] = 0,
) -> CacheBytes:  # fmt: skip
    """The bytes that a packed cache will take, from the codes that the model's layers have.

    Exact right behind prefill; with ``new_tokens`` the mean over the slack that storage may have
    just then. Layers that are left alone are not counted. Those of cross-attention are counted as
    if they held ``tokens`` tokens, too, and grew.

    Args:
        model: compiled or original; its codes were fitted, or loaded.
        batch: sequences.
        tokens: of each, padding included, when prefill packs them.
        new_tokens: of each that come after, one at a time.
        options: those of ``torch.compile``; None: those that a graph of the model was compiled
            with last, or where none was, the default ones with the only codes that there are.
        dtype: of the dense cache; None: that of the weights.
        visual: of the tokens of each sequence that prefill codes (all but the last ``window``), how
            many are visual: one number for all sequences, or one for each. It matters with the
            option ``visual_ratio`` alone.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: another argument is not accepted; layers have no codes, or several.
        OptionError: an option is not accepted, or chooses codes that are not fitted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: accepted is an nn.Module")
    _whole("batch", batch, 1)
    _whole("tokens", tokens, 1)
    _whole("new_tokens", new_tokens, 0)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r}: accepted is a floating-point dtype, or None")
    parameters = tuple(model.parameters())
    chosen = _options(parameters, options)
    policy = (chosen or Options()).policy
    by_kind = _kinds(visual, batch, max(tokens - policy.window, 0))
    fits = _fits(parameters, chosen)
    dense, kinds = 0, [0.0] * 4
    for weight, fit in fits:
        kind = weight.dtype if dtype is None else dtype
        if not kind.is_floating_point:
            raise ValueError(
                f"dtype=None: weights of a layer are {kind}; accepted is the dtype of its cache"
            )
        for ref in fit.codes:
            found = bytes_of(PackedSide.of(ref, policy, kind, by_kind), batch, tokens, new_tokens)
            kinds = [a + b for a, b in zip(kinds, found, strict=True)]
            token = ref.layout.heads * ref.layout.dim * kind.itemsize
            dense += batch * (tokens + new_tokens) * token
    codes, gains, exact, window = (round(count) for count in kinds)
    bases = total_bytes([ref for _, fit in fits for ref in fit.codes])
    return CacheBytes(dense, codes, gains, exact, window, 0, bases)


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: accepted is a whole number from {least} on")


def _kinds(visual: int | Sequence[int], batch: int, coded: int) -> tuple[int, int]:
    """Of text and of visual tokens, those of the sequence that has the most."""
    each = [visual] * batch if isinstance(visual, int) else list(visual)
    for count in each:
        _whole("visual", count, 0)
    if len(each) != batch or max(each) > coded:
        raise ValueError(
            f"visual={visual!r}: accepted is a whole number, or one for each of {batch} sequences, "
            f"up to {coded}: so many tokens are coded"
        )
    return coded - min(each), max(each)


def _options(
    parameters: tuple[nn.Parameter, ...], options: Mapping[str, Any] | None
) -> Options | None:
    """The options to go by; None: nothing says which."""
    if options is not None:
        chosen: Options | None = Options.parse(options)
    else:
        every = (r.options for r in REGISTRY.all() if r.options and r.is_of(parameters))
        chosen = next(reversed(tuple(every)), None)
    if chosen is not None and chosen.codec != "transform":
        raise OptionError(
            f"option codec={chosen.codec!r} has no fitted codes to predict from: accepted is "
            "'transform'"
        )
    return chosen


def _fits(
    parameters: Sequence[nn.Parameter], options: Options | None
) -> list[tuple[nn.Parameter, Fit]]:
    """The fit of every layer with these options, or the only ones, and its weight."""
    wanted = None if options is None else repr(options.key)
    found: dict[str, list[tuple[nn.Parameter, LayerProfile]]] = {}
    for parameter in parameters:
        for key, profile in PROFILES.of_weight(parameter).items():
            if wanted in (None, key):
                found.setdefault(key, []).append((parameter, profile))
    if len(found) > 1:
        raise ValueError(
            f"options=None: there are codes for several sets of options "
            f"({'; '.join(sorted(found))}); accepted are those of one"
        )
    layers = [pair for pairs in found.values() for pair in pairs]
    fits = [(weight, profile.fit) for weight, profile in layers if profile.fit is not None]
    if not layers or len(fits) < len(layers):
        which = f"{len(layers) - len(fits)} of its layers have no codes yet"
        with_ = f" with the options {wanted}" if wanted else ""
        raise ValueError(
            f"model: {which if layers else f'it has no codes{with_}'}: run a prompt through "
            "torch.compile(model, backend='attentionpack') that is long enough to fit them, or "
            "call apack_compile.fit"
        )
    return fits
