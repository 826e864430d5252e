"""``apack_compile.fit``: fit codes from samples of the user's own, ahead of the first prompt."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .. import hooks
from ..options import OptionError, Options
from ..runtime.replay import Unmeasured
from .keep import remember
from .layer import LEARNING, PROFILES
from .progress import Progress
from .session import FitError, Group, Session
from .summary import FitSummary, LayerSummary

BATCHES = (
    "accepted is an iterable of batches, each a dict of keyword arguments of the model's forward, "
    "or a tensor, its first argument (input_ids)"
)


def fit(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    options: Mapping[str, Any] | None = None,
    *,
    measure: bool = True,
    progress: bool | None = None,
) -> FitSummary:
    """Fit the codes of a model from samples; the first prompt then runs compiled.

    Runs the model once on each batch, and twice more with gradients. The codes are used by every
    ``torch.compile(model, backend="attentionpack", options=...)`` with options that codes do not
    depend on differently, in this process, and in later ones if the option ``profile_cache`` is on.

    Args:
        model: in evaluation mode; its forward makes a cache. A compiled one stands for the model
            inside.
        batches: see above; prompts as the model will see them. Several that are alike in nothing
            but kind are better than one.
        options: those of ``torch.compile(..., backend="attentionpack")``.
        measure: check the predicted sensitivity of every layer by running the model with one side
            of one layer coded, on the first batch, and correct it. Costs about as many prefills as
            the model has layers.
        progress: show a line on standard error; None: if that is a terminal.

    Returns:
        What was fitted.

    Raises:
        OptionError: an option is not accepted.
        FitError: no batches; one that makes no cache that is packed, with the reason; too few
            tokens; a model in training mode; inputs that require grad.
    """
    parsed = Options.parse(options)
    if parsed.codec != "transform":
        raise OptionError(
            f"option codec={parsed.codec!r} has nothing to fit: accepted is 'transform'"
        )
    if not isinstance(model, nn.Module):
        raise FitError(f"model={model!r}: accepted is an nn.Module")
    if isinstance(batches, (Tensor, Mapping, str)):
        raise FitError(f"batches is a {type(batches).__name__}: {BATCHES}")
    model = getattr(model, "_orig_mod", model)
    if model.training:
        raise FitError("the model is in training mode: call model.eval() first")
    hooks.install()
    hooks.install_capturing_hooks(model)
    started = time.monotonic()
    with LEARNING, torch.no_grad(), Progress("fitting codes", progress) as shown:
        session, count = Session(parsed), 0
        call = torch.compile(model._call_impl, backend=session.backend)
        for count, batch in enumerate(batches, start=1):
            shown.step(f"batch {count}")
            before = session.prefills
            _run(call, batch, count)
            if session.prefills == before:
                why = "; ".join(session.reasons) or "Dynamo traced no graph of its forward"
                raise FitError(f"batch {count} makes no cache that is packed: {why}")
        if not count:
            raise FitError(f"there are no batches: {BATCHES}")
        groups = list(session.groups.values())
        unmeasured = [r for group in groups if measure for r in _calibrate(group, shown)]
        shown.step("fitting")
        fits = [group.fit(parsed) for group in groups]
        paths = []
        for group, found in zip(groups, fits, strict=True):
            for profile, weight, one in zip(group.profiles, group.weights, found, strict=True):
                profile.use(one)
                PROFILES.put(weight, repr(parsed.key), profile)
            paths.append(remember(group.profiles, group.identity, parsed))
    every = [fit for found in fits for fit in found]
    trials = [
        None if g.trials is None else g.trials[i] for g in groups for i in range(len(g.profiles))
    ]
    reasons = unmeasured + [one.reason for one in every if one.reason]
    return FitSummary(
        tuple(
            LayerSummary((one.codes[0].code.error, one.codes[1].code.error), trial)
            for one, trial in zip(every, trials, strict=True)
        ),
        count,
        max(one.tokens for one in every),
        time.monotonic() - started,
        tuple(dict.fromkeys(reasons)),
        tuple(path for path in paths if path is not None),
    )


def _run(call: Any, batch: Any, number: int) -> None:
    if not isinstance(batch, (Tensor, Mapping)):
        raise FitError(f"batch {number} is a {type(batch).__name__}: {BATCHES}")
    for value in pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
        if isinstance(value, Tensor) and value.requires_grad:
            raise FitError(f"batch {number} has inputs that require grad: detach them")
    if isinstance(batch, Mapping):
        call(**batch)
    else:
        call(batch)


def _calibrate(group: Group, shown: Progress) -> list[str]:
    """Measure the layers of a group; why not, if not."""
    try:
        group.calibrate(lambda done, of: shown.step(f"measuring sensitivity, {done} of {of}"))
    except Unmeasured as error:
        reason = str(error).partition("\n")[0]  # what follows names a node of the graph
        return [f"the sensitivity is predicted, not measured: {reason}"]
    return []
