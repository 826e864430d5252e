"""The methods that are compared. Add one here; nothing else has to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .packed import PIECE, PackedRunner
from .rivals.base import Rival
from .rivals.dense import Dense
from .rivals.kivi import Kivi
from .rivals.snapkv import SnapKv
from .rivals.streaming import Streaming
from .rivals.truncated_svd import TruncatedSvd
from .rivals.turboquant import TurboQuant
from .runner import RivalRunner, Runner, Setting, Unavailable

OURS = "attentionpack"


@dataclass(frozen=True)
class Method:
    """A method by name.

    Attributes:
        name: in tables and plots.
        family: methods that differ in their bytes only.
        runs: of which runs it is part: "short", "target" (one context; ours, and no code), "full",
            "images".
        start: makes its runner.
    """

    name: str
    family: str
    runs: frozenset[str]
    start: Callable[[Setting], Runner]

    @property
    def ours(self) -> bool:
        """Whether it is attentionpack, and not a rival."""
        return self.family.startswith(OURS)


def _rival(
    name: str, family: str, make: Callable[[], Rival], short: bool = True, target: bool = False,
    images: bool = True, piece: int | None = None,
) -> Method:  # fmt: skip
    def start(setting: Setting) -> Runner:
        try:
            return RivalRunner(setting.subject, make(), piece)
        except ImportError as error:
            raise Unavailable(str(error).strip().splitlines()[0]) from error

    runs = {"full": True, "short": short, "target": target, "images": images}
    return Method(name, family, frozenset(run for run, part in runs.items() if part), start)


def _ours(
    name: str, family: str, runs: frozenset[str], options: Mapping[str, Any], beforehand: bool,
    coded_once: bool = True,
) -> Method:  # fmt: skip
    def start(setting: Setting) -> Runner:
        return PackedRunner(setting, options, beforehand, coded_once)

    return Method(f"{OURS} {name}", f"{OURS}{family}", runs, start)


@dataclass(frozen=True)
class Variant:
    """A variant of ours at several ratios.

    Attributes:
        title: behind the ratio in the name.
        ratios: those it is measured at, by run.
        options: of the backend, ratio aside.
        beforehand: fitted by ``apack_compile.fit``; else from the first prefill.
        coded_once: tokens that follow stay exact, as for the rivals.
        of: the option that the ratio is.
    """

    title: str
    ratios: Mapping[str, tuple[float, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    beforehand: bool = False
    coded_once: bool = True
    of: str = "ratio"

    @property
    def all(self) -> frozenset[float]:
        """The ratios of any run."""
        return frozenset(ratio for those in self.ratios.values() for ratio in those)

    def method(self, ratio: float) -> Method:
        """The variant at one ratio."""
        return _ours(
            f"{ratio:g}x{self.title}",
            self.title,
            frozenset(run for run, those in self.ratios.items() if ratio in those),
            {self.of: ratio, **self.options},
            self.beforehand,
            self.coded_once,
        )


ORDER = (8, 4, 6, 5, 12, 16, 2)
"""Ratios in the order in which they are measured, should time run out."""

TARGETS = (8, 4, 6, 5)
FULL = (8, 4, 6, 12, 2)
TIERED = (8, 12, 16)
IMAGES = (8, 4, 6, 12, 16, 2)
BEST = {"k_code": "pre-rope"}
KEPT = {"exact_share": 0.01}
THINNED = {"evict": 0.3}

VARIANTS = (
    Variant("", {"short": (4, 8), "target": TARGETS, "full": FULL, "images": IMAGES}),
    Variant(
        ", fitted beforehand", {"target": TARGETS, "full": FULL, "images": IMAGES},
        beforehand=True,
    ),
    Variant(
        ", pre-RoPE K, fitted beforehand", {"target": TARGETS, "full": FULL, "images": IMAGES},
        BEST, beforehand=True,
    ),
    Variant(
        ", pre-RoPE K", {"short": (8,), "target": TARGETS, "full": (8,), "images": (8, 16)}, BEST
    ),
    Variant(", Hadamard V", {"full": (8,)}, {"v_basis": "hadamard"}),
    Variant(", as decoded", {"full": (4, 8)}, coded_once=False),
    Variant(
        ", 1 % exact, fitted beforehand", {"target": (8, 6), "full": (8,), "images": (8,)},
        KEPT, beforehand=True,
    ),
    Variant(
        ", 1 % exact, pre-RoPE K, fitted beforehand",
        {"target": (8, 6), "full": (8,), "images": (8,)}, {**BEST, **KEPT}, beforehand=True,
    ),
    Variant(", 1 % exact", {"target": (8, 6), "full": (8,), "images": (8,)}, KEPT),
    Variant(
        ", 30 % evicted, fitted beforehand", {"target": (8,), "images": (8,)}, THINNED,
        beforehand=True,
    ),
    Variant(
        ", 30 % evicted, pre-RoPE K, fitted beforehand", {"target": (8,), "images": (8,)},
        {**BEST, **THINNED}, beforehand=True,
    ),
    Variant(
        " visual, 2x text, fitted beforehand", {"images": (8, 16)}, beforehand=True,
        of="visual_ratio",
    ),
    Variant(
        " visual, 2x text, pre-RoPE K, fitted beforehand", {"images": (8, 16)}, BEST,
        beforehand=True, of="visual_ratio",
    ),
    Variant(", paper mode", {"full": (8,), "images": (8, 4)}, {"codec": "svd"}),
)  # fmt: skip

TIERED_VARIANTS = (
    Variant(
        ", tiers, fitted beforehand", {"target": TIERED, "full": (8, 16), "images": TIERED},
        {"tiers": True}, beforehand=True,
    ),
    Variant(
        ", tiers, pre-RoPE K, fitted beforehand",
        {"target": TIERED, "full": (8, 16), "images": (8, 16)}, {**BEST, "tiers": True},
        beforehand=True,
    ),
)  # fmt: skip


def _quantized_cache(bits: int) -> Callable[[], Rival]:
    def make() -> Rival:
        from .rivals.quantized_cache import QuantizedCache

        return QuantizedCache(bits)

    return make


RIVALS: tuple[Method, ...] = (
    _rival("full precision", "full precision", Dense, target=True),
    # What follows goes through the model as for ours: in 16 bits, that alone makes a difference.
    _rival("full precision, in pieces", "full precision", Dense, short=False, piece=PIECE),
    _rival("KIVI 4 bit", "KIVI", lambda: Kivi(4)),
    _rival("KIVI 2 bit", "KIVI", lambda: Kivi(2)),
    _rival("TurboQuant 4 bit", "TurboQuant", lambda: TurboQuant(4)),
    _rival("TurboQuant 2 bit", "TurboQuant", lambda: TurboQuant(2)),
    _rival(
        "truncated SVD 4x (the paper)", "truncated SVD", lambda: TruncatedSvd(4), short=False,
        images=False,
    ),
    _rival(
        "truncated SVD 8x (the paper)", "truncated SVD", lambda: TruncatedSvd(8), images=False
    ),
    _rival("QuantizedCache 4 bit", "QuantizedCache", _quantized_cache(4), images=False),
    _rival(
        "QuantizedCache 2 bit", "QuantizedCache", _quantized_cache(2), short=False, images=False
    ),
    _rival("SnapKV 2x", "SnapKV", lambda: SnapKv(2), short=False),
    _rival("SnapKV 4x", "SnapKV", lambda: SnapKv(4), short=False),
    _rival("SnapKV 8x", "SnapKV", lambda: SnapKv(8)),
    _rival("StreamingLLM 2x", "StreamingLLM", lambda: Streaming(2), short=False),
    _rival("StreamingLLM 4x", "StreamingLLM", lambda: Streaming(4), short=False),
    _rival("StreamingLLM 8x", "StreamingLLM", lambda: Streaming(8)),
)  # fmt: skip

OTHERS = (
    *(
        _ours(codec, f" {codec}", frozenset({"full"}), {"codec": codec}, beforehand=False)
        for codec in ("int8", "int4")
    ),
    _ours(
        "8x, by Inductor", " by Inductor", frozenset({"full"}),
        {"ratio": 8, "inner": "inductor"}, beforehand=False,
    ),
)  # fmt: skip

METHODS: tuple[Method, ...] = (
    *RIVALS,
    *(
        variant.method(ratio)
        for variants in (VARIANTS, TIERED_VARIANTS)
        for ratio in ORDER
        for variant in variants
        if ratio in variant.all
    ),
    *OTHERS,
)


def named(methods: Sequence[Method], words: Sequence[str]) -> list[Method]:
    """Those that ``words`` are the names of, or part of them.

    The one of which a word is the whole name is meant by it alone.
    """
    names = {m.name for m in methods}
    return [
        m for m in methods if any(w == m.name or (w not in names and w in m.name) for w in words)
    ]
