"""The paper's settings and ablations on our model: methods of the run "paper".

Ranks are of 192 channels (3 KV heads of 64), where the paper's are of 4,096: they go by what share
of the channels stays, not by number. A quarter of the tokens with all components, and a quarter of
the components for the others, are the paper's own.
"""

from __future__ import annotations

from collections.abc import Iterator

from .method import Method, rival
from .rivals.factors import Factors
from .rivals.paper import Paper

SHARE = 0.25

SWEEP = ((96, 96), (96, 48), (48, 96), (48, 48), (24, 48), (24, 24), (12, 24), (12, 12))
"""Ranks of keys and of values."""

RANK = 48
"""Of everything but the sweep."""

EQUAL = {8: (29, 7), 4: (58, 14)}
"""Components of the paper's own setting, and of its other tokens' values, for a ratio as ours: 8.1
and 4.1 at 2,048 tokens, bases counted."""


def tiered(rank: int, rest: int, bits: int = 16) -> Paper:
    """The paper's own setting: all components of keys, and of the values of a quarter of tokens."""
    return Paper(Factors(rank, bits=bits), Factors(rank, rest, bits=bits), SHARE)


def _settings() -> Iterator[tuple[str, Paper]]:
    for ratio, (rank, rest) in EQUAL.items():
        yield f"own setting, {ratio}x", tiered(rank, rest)
    for k, v in SWEEP:
        yield f"K {k}, V {v}", Paper(Factors(k), Factors(v))
    for rank in (24, 48):
        one = Factors(rank // 3, by_head=True)
        yield f"K {rank}, V {rank}, by head", Paper(one, one)
    low, whole = Factors(RANK // 2), Factors(RANK)
    yield f"K {RANK // 2}, V exact", Paper(low, None)
    yield f"K exact, V {RANK // 2}", Paper(None, low)
    part = Factors(RANK, RANK // 4)
    for share in (0.5, SHARE, 0.1, 0):
        yield f"K {RANK}, V {RANK}, {share:.0%} whole", Paper(whole, part, share)
    yield f"K {RANK}, V {RANK}, {SHARE:.0%} whole, K too", Paper(part, part, SHARE)
    for bits in (8, 4):
        some = Factors(RANK, bits=bits)
        yield f"K {RANK}, V {RANK}, {bits} bit", Paper(some, some)
    double = Factors(2 * RANK, bits=4)
    yield f"K {2 * RANK}, V {2 * RANK}, 4 bit", Paper(double, double)
    yield f"K {RANK}, V {RANK}, {SHARE:.0%} whole, 4 bit", tiered(RANK, RANK // 4, 4)
    for share in (0.7, SHARE):
        yield f"K {RANK}, V {RANK}, {share:.0%} kept", Paper(whole, whole, share, evict=True)
    four = Factors(RANK, bits=4)
    yield f"K {RANK}, V {RANK}, {SHARE:.0%} kept, 4 bit", Paper(four, four, SHARE, evict=True)


def _method(name: str, code: Paper) -> Method:
    title = f"paper: {name}"
    return rival(title, "the paper", lambda: code, frozenset({"paper"}), alone=True)


PAPER = tuple(_method(name, code) for name, code in _settings())
