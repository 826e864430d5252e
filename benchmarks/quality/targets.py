"""The targets of the codes at 3,072 tokens of context, and what was measured, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

TARGETS = ((4, 0.0015, 0.0008, 0.985), (6, 0.005, 0.003, 0.97), (8, 0.010, 0.006, 0.96))
"""Ratio; most KL with keys as attention sees them; most KL and least top-1 of the best variant."""

SEEN = ""
BEST = ", pre-RoPE K"
"""Variants by what their names have behind the ratio: tiers are not part of the targets."""

FITS = (", fitted beforehand", "")
"""How codes were fitted, by the end of the name."""

HEAD = "| | asked | fitted beforehand | from a first prompt |\n|---|---|---|---|"

DEFAULT_KL = 0.003


def markdown(results: Mapping[str, Any]) -> str:
    """One row a target.

    Args:
        results: content of a result file.
    """
    cells = {cell["method"]: cell for cell in results["cells"]}
    rows = []
    for ratio, seen, best, top1 in TARGETS:
        rows += [
            (f"{ratio}x: KL, keys as attention sees them", f"at most {seen}", _kl, ratio, seen,
             (SEEN,)),
            (f"{ratio}x: KL, best variant", f"at most {best}", _kl, ratio, best, (BEST, SEEN)),
            (f"{ratio}x: top-1, best variant", f"at least {top1:.1%}", _top1, ratio, top1,
             (BEST, SEEN)),
        ]  # fmt: skip
    lines = [
        _row(title, asked, [_found(judge, cells, ratio, variants, fit, limit) for fit in FITS])
        for title, asked, judge, ratio, limit, variants in rows
    ]
    dense = cells.get("full precision")
    if dense is not None:
        for variant, title in ((SEEN, "keys as attention sees them"), (BEST, "before rotation")):
            found = [_keys(_cells(cells, 8, (variant,), fit), dense) for fit in FITS]
            lines.append(_row(f"8x: pass keys, {title}", _counted(dense), found))
    largest = [_largest(cells, fit) for fit in FITS]
    asked = f"the largest with KL at most {DEFAULT_KL}"
    lines.append(_row("default ratio, keys as attention sees them", asked, largest))
    return "\n".join([HEAD, *lines])


Cells = list[Mapping[str, Any]]


def _row(title: str, asked: str, found: list[str]) -> str:
    return f"| {title} | {asked} | {' | '.join(found)} |"


def _cells(cells: Mapping[str, Any], ratio: float, variants: tuple[str, ...], fit: str) -> Cells:
    names = [f"attentionpack {ratio:g}x{variant}{fit}" for variant in variants]
    return [cells[name] for name in names if name in cells]


def _found(
    judge: Callable[[Cells, float], str], cells: Mapping[str, Any], ratio: float,
    variants: tuple[str, ...], fit: str, limit: float,
) -> str:  # fmt: skip
    """What is judged, but no target is missed by the best of variants that are not all there."""
    some = _cells(cells, ratio, variants, fit)
    verdict = judge(some, limit)
    return "not measured" if len(some) < len(variants) and "missed" in verdict else verdict


def _judged(value: str, met: bool) -> str:
    return f"{value}, met" if met else f"**{value}, missed**"


def _kl(cells: Cells, limit: float) -> str:
    if not cells:
        return "not measured"
    kl = min(cell["kl"]["mean"] for cell in cells)
    return _judged(f"{kl:.2g}", kl <= limit)


def _top1(cells: Cells, limit: float) -> str:
    if not cells:
        return "not measured"
    top1 = max(cell["top1"]["mean"] for cell in cells)
    return _judged(f"{top1:.1%}", top1 >= limit)


def _counted(cell: Mapping[str, Any]) -> str:
    hits = cell["by_window"]["passkeys"]
    return f"{sum(map(int, hits))} of {len(hits)}"


def _keys(cells: Cells, dense: Mapping[str, Any]) -> str:
    if not cells:
        return "not measured"
    met = sum(cells[0]["by_window"]["passkeys"]) >= sum(dense["by_window"]["passkeys"])
    return _judged(_counted(cells[0]), met)


def _largest(cells: Mapping[str, Any], fit: str) -> str:
    """The largest ratio up to which the KL is low enough."""
    known = [(ratio, _cells(cells, ratio, (SEEN,), fit)) for ratio in (2, 4, 5, 6, 8, 12, 16)]
    fits = [r for r, found in known if found and found[0]["kl"]["mean"] <= DEFAULT_KL]
    return f"{max(fits)}" if fits else "none measured"
