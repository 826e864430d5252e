"""Learn codes from prefills: gather moments until there are enough, then fit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from ..codec import CodeRef, ModalLayout, TransformLayout
from ..codec.fit import Evidence, fit_transform
from ..codec.fit_modal import fit_modal
from ..codec.fixed import fixed_ref
from ..codec.kinds import least_tokens
from ..codec.recipe import Recipe
from ..codec.rotation import Rotation
from ..codec.sensitivity import Sensitivity
from ..options import Options
from .layer import ANY_LENGTH, Fit, LayerProfile, Lesson

log = logging.getLogger(__name__)

LEAST_REACH = 4096
"""Codes of rotated keys are fitted for contexts of at least so many tokens, and twice those seen;
where the rotation is not known, for a quarter more than those seen."""

MOST_STRAYS = 0.05
"""Keys are coded before their rotation if at most this share of the tokens has other positions
than a count gives (images in models with positions by row and column have)."""

Sense = Callable[[], "list[Sensitivity] | str"]
"""Measures the sensitivity of all layers; a text says why it cannot."""


def learn(
    profiles: Sequence[LayerProfile], lessons: Sequence[Lesson], options: Options, sense: Sense
) -> bool:
    """Learn from one prefill; layers that are ready are fitted.

    If a fit fails, the layers concerned keep the codes that they have; without any they get exact
    ones, with the reason, but where memory ran out: then the next prompt is another try.

    Args:
        profiles: of the layers of a graph.
        lessons: one for each.
        options: the ratio and how many tokens a fit wants.
        sense: measures the sensitivity of all layers, or says why it cannot.

    Returns:
        Whether anything was fitted.
    """
    ready: list[int] = []
    seen: list[LayerProfile] = []
    for index, (profile, lesson) in enumerate(zip(profiles, lessons, strict=True)):
        served = profile.serves(lesson.length, bool(lesson.visual))
        if served or any(profile is other for other in seen):
            continue
        seen.append(profile)
        profile.take(lesson)
        if profile.is_ready(options):
            ready.append(index)
    if not ready:
        return False
    try:
        measured = sense()
    except Exception as error:  # the model must run, whatever goes wrong here
        log.warning("attentionpack: the sensitivity could not be measured", exc_info=True)
        measured = first_line(error)
    fitted = False
    for indices in by_shape(profiles, ready):
        group = [profiles[i] for i in indices]
        found = measured if isinstance(measured, str) else [measured[i] for i in indices]
        try:
            fits = fit_layers(group, found, options)
            fitted = True
        except Exception as error:
            log.warning("attentionpack: %s; these layers are not fitted", first_line(error))
            log.debug("the fit that failed", exc_info=True)
            if isinstance(error, torch.OutOfMemoryError):
                continue
            reason = first_line(error)
            fits = [_kept(p.fit, reason) if p.fit else _exact_fit(p, reason) for p in group]
        for profile, fit in zip(group, fits, strict=True):
            profile.use(fit)
    return fitted


def by_shape(profiles: Sequence[LayerProfile], ready: Sequence[int]) -> list[list[int]]:
    """The numbers ``ready``, those of layers of one shape together."""

    def shape(index: int) -> tuple[int, ...]:
        return profiles[index].shape

    return [list(group) for _, group in groupby(sorted(ready, key=shape), shape)]


def fit_layers(
    group: Sequence[LayerProfile], sensitivities: Sequence[Sensitivity] | str, options: Options
) -> list[Fit]:
    """Fit layers of one shape, for contexts up to the reach. Nothing is changed.

    Args:
        group: the layers, with moments.
        sensitivities: of each, or why they are not known.
        options: what to fit.

    Raises:
        ValueError: no code is that small.
    """
    reach = reach_of(group)
    reasons = []
    if isinstance(sensitivities, str):
        reasons.append(f"sensitivity not measured ({sensitivities}): the same bits in every layer")
    recipe = options.recipe
    if recipe.k_code == "pre-rope":
        obstacle = _bars_pre_rope([p.rotation for p in group])
        if obstacle:
            recipe = replace(recipe, k_code="post-rope")
            reasons.append(f"keys are coded as attention sees them: {obstacle}")
    blind = recipe.visual_ratio and any(p.fit is not None and p.fit.is_blind for p in group)
    # Kept, for graphs are compiled for them, unless they were chosen without visual tokens.
    layouts = None if blind else _layouts_of(group, recipe)
    if recipe.visual_ratio:
        reasons += _borrowed(group[0])
    started = time.monotonic()
    layers = evidence(group, sensitivities)
    fit: Any = fit_modal if recipe.visual_ratio else fit_transform
    codes = fit(layers, group[0].dims, recipe, reach, layouts)
    if not all(p.isfinite().all() for pair in codes for code in pair for p in code.params):
        raise ValueError("the fit gave numbers that are not finite")
    log.info("fitted %d layers in %.1f s", len(group), time.monotonic() - started)
    if codes[0][0].layout.positional:
        reach = ANY_LENGTH
    return [
        Fit(
            (CodeRef(k), CodeRef(v)),
            profile.rotation,
            reach,
            "; ".join(reasons),
            profile.count,
            profile.visual_count,
        )
        for profile, (k, v) in zip(group, codes, strict=True)
    ]


def _borrowed(profile: LayerProfile) -> list[str]:
    """Of which kinds of tokens there were too few for a basis of their own."""
    assert profile.moments is not None
    if profile.visual_count is None:
        return ["kinds of tokens were not known: both codes have the basis of all"]
    wanted = least_tokens(profile.moments.k_sum.numel())
    counts = {"visual": profile.visual_count, "text": profile.count - profile.visual_count}
    return [
        f"the code of {name} tokens has the basis of all: {count} of {wanted} tokens seen"
        for name, count in counts.items() if count < wanted
    ]  # fmt: skip


def reach_of(group: Sequence[LayerProfile]) -> int:
    """Tokens of context that codes should serve, after what was seen."""
    length = max(p.longest for p in group)
    turned = all(p.rotation is not None for p in group)
    return max(LEAST_REACH, 2 * length) if turned else -(-5 * length // 1024) * 256


def evidence(
    group: Sequence[LayerProfile], sensitivities: Sequence[Sensitivity] | str
) -> list[Evidence]:
    """What the codes of these layers are fitted from."""
    known = [None] * len(group) if isinstance(sensitivities, str) else sensitivities
    layers = []
    for profile, sensitivity in zip(group, known, strict=True):
        assert profile.moments is not None
        visual = profile.visual if profile.knows_kinds else None
        layers.append(Evidence(profile.moments, profile.rotation, sensitivity, visual))
    return layers


def _exact_fit(profile: LayerProfile, reason: str) -> Fit:
    """Codes that lose nothing."""
    heads, dims = profile.shape[2] // profile.dims[0], profile.dims
    exact = fixed_ref("exact", heads, dims[0]), fixed_ref("exact", heads, dims[1])
    text = f"{reason}: packed exactly"
    return Fit(exact, profile.rotation, ANY_LENGTH, text, profile.count)


def _kept(fit: Fit, reason: str) -> Fit:
    """Codes for want of better ones; no further prompt is a try to fit them anew."""
    text = f"{reason}: codes of an earlier fit are kept, beyond what they were fitted for"
    return replace(fit, reach=ANY_LENGTH, settled=True, reason=text)


def first_line(error: Exception) -> str:
    """What an error says, without what follows about nodes of a graph."""
    return (str(error) or type(error).__name__).partition("\n")[0]


def _bars_pre_rope(rotations: Sequence[Rotation | None]) -> str:
    """Why keys cannot be coded before their rotation; empty if they can."""
    known = [r for r in rotations if r is not None]
    if len(known) < len(rotations):
        return "the graph does not show their rotation"
    strays = max(r.strays for r in known)
    if strays > MOST_STRAYS:
        return f"{strays:.0%} of the prompt's tokens have other positions than a count gives"
    return ""


def _layouts_of(group: Sequence[LayerProfile], recipe: Recipe) -> list[tuple[Any, Any]] | None:
    """The layouts that the layers have from an earlier fit, if all have ones of this recipe."""
    before = recipe.k_code == "pre-rope"
    wanted = ModalLayout if recipe.visual_ratio else TransformLayout
    layouts = []
    for profile in group:
        k, v = (ref.layout for ref in profile.codes) if profile.codes else (None, None)
        if not isinstance(k, wanted) or not isinstance(v, wanted):
            return None
        if k.positional != before or bool(v.tier_shares) != recipe.tiers:
            return None
        if (k.kept, k.evicts) != (recipe.kept, recipe.evicted):
            return None
        layouts.append((k, v))
    return layouts
