"""Pictures by matplotlib, if it is there: the same file from the same figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """``matplotlib.pyplot``, for files alone; None if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plots

    matplotlib.rcParams["svg.hashsalt"] = "attentionpack"
    return plots


def save(figure: Any, path: Path) -> None:
    """Write a figure, its format by the suffix."""
    figure.savefig(path, bbox_inches="tight", dpi=120, metadata={"Date": None})
