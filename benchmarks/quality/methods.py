"""The methods that are compared. Add one here; nothing else has to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from .method import Method, Variant, ours, rival
from .packed import PIECE
from .paper import PAPER
from .rivals.base import Rival
from .rivals.dense import Dense
from .rivals.h2o import H2O
from .rivals.kivi import Kivi
from .rivals.snapkv import SnapKv
from .rivals.streaming import Streaming
from .rivals.truncated_svd import TruncatedSvd
from .rivals.turboquant import TurboQuant

ORDER = (8, 4, 6, 5, 12, 16, 2)
"""Ratios in the order in which they are measured, should time run out."""

TARGETS = (8, 4, 6, 5)
FULL = (8, 4, 6, 12, 2)
TIERED = (8, 12, 16)
IMAGES = (8, 4, 6, 12, 16, 2)
BEST = {"k_code": "pre-rope"}
KEPT = {"exact_share": 0.01}
THINNED = {"evict": 0.3}
BESIDE = {"paper": (8,), "questions": (8,)}
EVERYWHERE = {"target": TARGETS, "full": FULL, "images": IMAGES, "questions": (8, 4)}

VARIANTS = (
    Variant(
        "",
        {"short": (4, 8), "target": TARGETS, "full": FULL, "images": IMAGES, "questions": (8,)},
    ),
    Variant(", fitted beforehand", {**EVERYWHERE, "paper": FULL}, beforehand=True),
    Variant(
        ", pre-RoPE K, fitted beforehand", {**EVERYWHERE, "paper": (8, 4)}, BEST, beforehand=True
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
        ", 30 % evicted, fitted beforehand", {"target": (8,), "images": (8,), **BESIDE}, THINNED,
        beforehand=True,
    ),
    Variant(
        ", 30 % evicted, pre-RoPE K, fitted beforehand",
        {"target": (8,), "images": (8,), **BESIDE},
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
    Variant(
        ", paper mode", {"full": (8,), "images": (8, 4), "paper": (8,)}, {"codec": "svd"}
    ),
)  # fmt: skip

TIERED_VARIANTS = (
    Variant(
        ", tiers, fitted beforehand",
        {"target": TIERED, "full": (8, 16), "images": TIERED, **BESIDE}, {"tiers": True},
        beforehand=True,
    ),
    Variant(
        ", tiers, pre-RoPE K, fitted beforehand",
        {"target": TIERED, "full": (8, 16), "images": (8, 16), **BESIDE},
        {**BEST, "tiers": True}, beforehand=True,
    ),
    Variant(
        " visual, 4x text, tiers, fitted beforehand", {"images": (16,)},
        {"text_ratio": 4, "tiers": True}, beforehand=True, of="visual_ratio",
    ),
)  # fmt: skip


def _quantized_cache(bits: int) -> Callable[[], Rival]:
    def make() -> Rival:
        from .rivals.quantized_cache import QuantizedCache

        return QuantizedCache(bits)

    return make


EVICTIONS: dict[str, Callable[[float], Rival]] = {
    "SnapKV": SnapKv, "H2O": H2O, "StreamingLLM": Streaming,
}  # fmt: skip

LONG = frozenset({"full", "images"})
SHORT = LONG | {"short"}
FULL_ALONE = frozenset({"full"})

RIVALS: tuple[Method, ...] = (
    rival(
        "full precision", "full precision", Dense, SHORT | {"target", "paper", "questions"}
    ),
    # What follows goes through the model as for ours: in 16 bits, that alone makes a difference.
    rival("full precision, in pieces", "full precision", Dense, LONG, PIECE),
    rival("KIVI 4 bit", "KIVI", lambda: Kivi(4), SHORT | {"paper"}),
    rival("KIVI 2 bit", "KIVI", lambda: Kivi(2), SHORT | {"questions"}),
    rival("TurboQuant 4 bit", "TurboQuant", lambda: TurboQuant(4), SHORT),
    rival("TurboQuant 2 bit", "TurboQuant", lambda: TurboQuant(2), SHORT | {"questions"}),
    rival(
        "truncated SVD 4x (the paper)", "truncated SVD", lambda: TruncatedSvd(4), FULL_ALONE
    ),
    rival(
        "truncated SVD 8x (the paper)", "truncated SVD", lambda: TruncatedSvd(8),
        FULL_ALONE | {"short"},
    ),
    rival(
        "QuantizedCache 4 bit", "QuantizedCache", _quantized_cache(4), FULL_ALONE | {"short"}
    ),
    rival("QuantizedCache 2 bit", "QuantizedCache", _quantized_cache(2), FULL_ALONE),
    *(
        rival(
            f"{name} {ratio}x", name, partial(make, ratio),
            (SHORT if ratio == 8 else LONG) | {"paper", "questions"},
        )
        for name, make in EVICTIONS.items()
        for ratio in (2, 4, 8)
    ),
)  # fmt: skip

OTHERS = (
    *(
        ours(codec, f" {codec}", FULL_ALONE, {"codec": codec}, beforehand=False)
        for codec in ("int8", "int4")
    ),
    ours(
        "8x, by Inductor", " by Inductor", FULL_ALONE,
        {"ratio": 8, "inner": "inductor"}, beforehand=False,
    ),
)  # fmt: skip

METHODS: tuple[Method, ...] = (
    *RIVALS,
    *PAPER,
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
