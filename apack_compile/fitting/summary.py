"""What a fit tells its user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.calibrate import Trial


@dataclass(frozen=True)
class LayerSummary:
    """One layer.

    Attributes:
        errors: relative squared coding error of keys and of values, as predicted from the samples.
        trials: what coding the keys alone, and the values alone, at a trial code costs: predicted
            and measured KL, and what rounding has of that. None if it was not measured.
    """

    errors: tuple[float, float]
    trials: tuple[Trial, Trial] | None


@dataclass(frozen=True)
class FitSummary:
    """What :func:`apack_compile.fit` did.

    Attributes:
        layers: in the order of the graph.
        batches: that the codes were fitted on.
        tokens: in them, sinks and padding left out.
        seconds: it took.
        reasons: what is not as it should be.
        paths: files in the cache folder that hold the codes now.
    """

    layers: tuple[LayerSummary, ...]
    batches: int
    tokens: int
    seconds: float
    reasons: tuple[str, ...]
    paths: tuple[Path, ...]

    @property
    def rank_correlation(self) -> tuple[float, float] | None:
        """Spearman's, of predicted and measured cost over the layers: of keys, of values."""
        trials = [layer.trials for layer in self.layers if layer.trials is not None]
        if len(trials) < 2:
            return None
        k, v = (
            spearman([t[i].predicted for t in trials], [t[i].cost for t in trials])
            for i in range(2)
        )
        return k, v

    def __str__(self) -> str:
        lines = [
            f"attentionpack: codes of {len(self.layers)} layers fitted on {self.tokens} tokens of "
            f"{self.batches} batches in {self.seconds:.1f} s"
        ]
        for side, title in enumerate(("keys", "values")):
            errors = [layer.errors[side] for layer in self.layers]
            lines.append(
                f"  coding error of {title}, relative: mean {sum(errors) / len(errors):.4f}, "
                f"largest {max(errors):.4f}"
            )
        if self.rank_correlation is not None:
            k, v = self.rank_correlation
            lines.append(
                "  sensitivity of layers, predicted and measured: rank correlation "
                f"{k:.2f} for keys, {v:.2f} for values"
            )
        lines += [f"  {reason}" for reason in self.reasons]
        lines += [f"  saved to {path}" for path in self.paths]
        return "\n".join(lines)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 if all values of one side are equal."""
    x, y = _ranks(a), _ranks(b)
    mean = (len(x) - 1) / 2
    above = sum((i - mean) * (j - mean) for i, j in zip(x, y, strict=True))
    norm = sum((i - mean) ** 2 for i in x) * sum((j - mean) ** 2 for j in y)
    return above / norm**0.5 if norm else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]
