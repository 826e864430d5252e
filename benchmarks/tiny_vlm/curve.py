"""The course of a training as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..figure import pyplot, save

SHARES = ("drawings", "digits", "which", "what", "needle", "read", "clip")


def plot(points: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Loss above, shares of what is right below; False if matplotlib is not installed.

    Args:
        points: of the curve, in their order.
        path: of the picture, its format by the suffix.
    """
    plots = pyplot()
    if plots is None:
        return False
    figure, (above, below) = plots.subplots(2, 1, figsize=(9, 7), sharex=True)
    numbers = range(len(points))
    above.plot(numbers, [point["loss"] for point in points], color="0.3", linewidth=1)
    above.set(yscale="log", ylabel="loss")
    for share in SHARES:
        here = [(i, point[share]) for i, point in enumerate(points) if share in point]
        if here:
            below.plot(*zip(*here, strict=True), label=share, linewidth=1)
    for i, point in enumerate(points):
        if i == 0 or point["stage"] != points[i - 1]["stage"]:
            above.axvline(i, color="0.7", linewidth=0.8)
            above.annotate(point["stage"], (i, 1), xycoords=("data", "axes fraction"), va="bottom")
            below.axvline(i, color="0.7", linewidth=0.8)
    below.set(xlabel="points of the curve", ylabel="share of fresh samples right", ylim=(0, 1.02))
    below.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    save(figure, path)
    plots.close(figure)
    return True
