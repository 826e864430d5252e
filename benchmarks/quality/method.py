"""What a method is, and how rivals and variants of ours become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .packed import PackedRunner
from .rivals.base import Rival
from .runner import RivalRunner, Runner, Setting, Unavailable

OURS = "attentionpack"


@dataclass(frozen=True)
class Method:
    """A method by name.

    Attributes:
        name: in tables and plots.
        family: methods that differ in their bytes only.
        runs: of which runs it is part: "short", "target" (one context; ours, and no code), "full",
            "images", "paper" (the settings of the paper), "questions" (several about one context).
        start: makes its runner.
        alone: a rival that a process measures without the others, as it takes a processor's time.
    """

    name: str
    family: str
    runs: frozenset[str]
    start: Callable[[Setting], Runner]
    alone: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is attentionpack, and not a rival."""
        return self.family.startswith(OURS)


def rival(
    name: str, family: str, make: Callable[[], Rival], runs: frozenset[str],
    piece: int | None = None, alone: bool = False,
) -> Method:  # fmt: skip
    """A rival's method; what follows goes through the model in pieces, if their size is given."""

    def start(setting: Setting) -> Runner:
        try:
            return RivalRunner(setting.subject, make(), piece)
        except ImportError as error:
            raise Unavailable(str(error).strip().splitlines()[0]) from error

    return Method(name, family, runs, start, alone)


def ours(
    name: str, family: str, runs: frozenset[str], options: Mapping[str, Any], beforehand: bool,
    coded_once: bool = True,
) -> Method:  # fmt: skip
    """A method of ours: see :class:`PackedRunner`."""

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
        return ours(
            f"{ratio:g}x{self.title}",
            self.title,
            frozenset(run for run, those in self.ratios.items() if ratio in those),
            {self.of: ratio, **self.options},
            self.beforehand,
            self.coded_once,
        )
