"""attentionpack itself: ``torch.compile(model, backend="attentionpack", options=...)``.

The context is prefilled by the compiled model into a ``DynamicCache``, which leaves it packed.
What follows goes through the compiled model as well, in pieces of 16 tokens: up to so many, the
decode graph attends to the codes themselves, as it does for one token. With ``block`` as long as
all that follows, nothing but the context is coded, as for the rivals. With the default block, of
32, tokens that leave the window of the last 64 are coded when they would be in decoding token by
token: pieces of 16 end where blocks end.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import apack_compile
from apack_compile.accounting import coded_part
from apack_compile.options import OptionError, Options
from apack_compile.source_hash import source_hash

from .rivals.base import RECENT, SINKS
from .runner import Setting, Sizes, Unavailable
from .speed import attend_us
from .subject import Inputs, Prompts, as_inputs

PIECE = 16
"""Tokens of a piece: the most for which the decode graph attends to codes."""

FIT_TOKENS = 2048
"""Tokens of a calibration prompt, unless contexts are long."""


class PackedRunner:
    """The compiled model.

    Args:
        setting: the model, and prompts to fit on.
        options: of the backend.
        beforehand: codes are fitted by ``apack_compile.fit`` on all calibration prompts; else from
            the first prefill, which is that of one calibration prompt: of one length for all
            contexts of a run, so that a cell does not depend on which were measured before it.
        coded_once: whether tokens that follow stay exact.

    Raises:
        Unavailable: the installed attentionpack does not accept these options, or cannot fit
            beforehand.
    """

    def __init__(
        self, setting: Setting, options: Mapping[str, Any], beforehand: bool, coded_once: bool
    ) -> None:
        self.setting = setting
        self.subject = setting.subject
        self.beforehand = beforehand
        # Codes kept on disk would make a method depend on what ran before it.
        own = {"sinks": SINKS, "window": RECENT, "profile_cache": False}
        self.options = {"inner": setting.inner, **options, **own}
        self.block = Options().block
        if coded_once:
            self.options["block"] = setting.following
        try:
            Options.parse(self.options)
        except OptionError as error:
            raise Unavailable(str(error)) from error
        if beforehand and not hasattr(apack_compile, "fit"):
            raise Unavailable("apack_compile.fit is not there")
        torch._dynamo.reset()
        model = self.subject.model
        self.fitted_for = 0
        if beforehand:
            prompts = fitted_on(setting)
            _check(apack_compile.fit(model, prompts, options=self.options).reasons)
            self.fitted_for = max(_length(prompt) for prompt in prompts)
        self.compiled = torch.compile(model, backend="attentionpack", options=self.options)
        self.follows = 0
        self.attend_us: float | None = None

    def prefill(self, prompts: Prompts) -> DynamicCache:
        """A packed cache of the prompts, which are not what the codes are fitted on.

        Raises:
            RuntimeError: a layer came out without a code, or sensitivity was not measured.
        """
        learns = self.options.get("codec", Options.codec) == "transform"
        if learns and not self.fitted_for:
            prompt = self.setting.calibration(self.setting.learnt_from)[0]
            self._prefill(prompt)
            graphs = apack_compile.report(self.subject.model).graph_reports
            _check([reason for graph in graphs for _, reason in graph.notes])
            self.fitted_for = _length(prompt)
        # Its embeddings do not show what is an image: they were made beforehand.
        visual = self.subject.visual(prompts.ids) if self.options.get("visual_ratio") else None
        with nullcontext() if visual is None else apack_compile.visual_tokens(visual):
            cache = self._prefill(as_inputs(prompts.ids))
        for layer in cache.layers:
            for side in (layer.keys, layer.values):
                if not isinstance(side, apack_compile.PackedKV) or _layout(side).kind == "exact":
                    raise RuntimeError(f"not coded: {apack_compile.report(self.subject.model)}")
        return cache

    def _prefill(self, inputs: Inputs) -> DynamicCache:
        cache = DynamicCache()
        if self.setting.many_lengths:  # one graph for all of them from the start
            name, tokens = next(iter(inputs.items()))
            tokens = tokens.clone()
            torch._dynamo.mark_dynamic(tokens, 1)
            inputs = {**inputs, name: tokens}
        self.compiled(**inputs, past_key_values=cache, logits_to_keep=1)
        return cache

    def follow(self, cache: DynamicCache, ids: Tensor) -> Tensor:
        """Logits of what follows, piece by piece on a copy of the cache."""
        return self.grow(cache, ids)[0]

    def grow(self, cache: DynamicCache, ids: Tensor) -> tuple[Tensor, DynamicCache]:
        """:meth:`follow`, and the copy."""
        if ids.shape[1] % PIECE:
            raise ValueError(f"{ids.shape[1]} tokens: accepted are multiples of {PIECE}")
        grown = copy.deepcopy(cache)
        logits = []
        for piece in ids.split(PIECE, 1):
            piece = piece.clone()
            # Else Dynamo makes the number of new tokens a symbol: it was that of the prefill.
            torch._dynamo.mark_static(piece, 1)
            logits.append(self.compiled(piece, past_key_values=grown).logits)
            self.follows += 1
        return torch.cat(logits, 1), grown

    def sizes(self, cache: DynamicCache) -> Sizes:
        """Counted on the cache: codes by layout, everything else by storage.

        Bases of single sequences and exact tokens beyond the sinks are shared by coded tokens.
        Exact tokens count as 16-bit numbers, as in a 16-bit model; the ring of recent tokens
        with the default block, not the one that :class:`PackedRunner` was given.
        """
        sides = [s for layer in cache.layers for s in (layer.keys, layer.values)]
        part = coded_part([side.store for side in sides])
        assert part is not None
        tokens = sides[0].shape[0] * (sides[0].store.coded - SINKS)
        count = apack_compile.cache_bytes(cache)
        to_16_bit = 2 / sides[0].dtype.itemsize
        slots = RECENT + self.options.get("block", self.block)
        window = count.window * (RECENT + self.block) / slots
        packed = count.codes + count.gains + to_16_bit * (count.exact_tokens + window)
        whole_ratio = to_16_bit * count.dense / packed
        codes = [(layer.keys.store.ref, layer.values.store.ref) for layer in cache.layers]
        self.attend_us = attend_us(codes, self.subject.q_heads)
        return Sizes(part.ratio, whole_ratio, part.packed / tokens, count.bases)

    def notes(self) -> dict[str, Any]:
        """Options, tokens of the longest prompt that codes were fitted on (0: of none), how often
        packed attention ran (layers times pieces if always), and how long it would take: see
        :func:`attend_us`.
        """
        report = apack_compile.report(self.subject.model)
        return {
            "options": self.options,
            "fitted": "beforehand" if self.beforehand else "first prefill",
            "fitted_for": self.fitted_for,
            "packed_attention_calls": report.attends,
            "of": self.follows * self.subject.layers,
            "attend_us": self.attend_us,
            "sources": sources(),
        }


def fitted_on(setting: Setting) -> list[Inputs]:
    """The calibration prompts as ``fit`` gets them.

    Codes reach twice as far as the prompts that they are fitted on: half the length will do.
    """
    return setting.calibration(max(FIT_TOKENS, setting.longest // 2))


def _length(inputs: Inputs) -> int:
    return next(iter(inputs.values())).shape[1]


def sources() -> str:
    """Which attentionpack this is: its version says less while it is being made."""
    return source_hash()[:12]


def _check(reasons: Sequence[str]) -> None:
    """A code without its sensitivity, for want of memory say, is not the one to be measured."""
    for reason in reasons:
        if "not measured" in reason:
            raise RuntimeError(reason)


def _layout(side: Any) -> Any:
    return side.store.ref.layout
