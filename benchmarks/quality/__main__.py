"""Measure how well codes of the KV cache keep the outputs of SmolLM2-135M-Instruct.

python -m benchmarks.quality                                   minutes on two cores
python -m benchmarks.quality --context 3072 --windows 5        our codes, for the targets
python -m benchmarks.quality --full --device cuda --minutes 8  everything; go on by running again
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .documents import documents, windows
from .evaluate import NEXT, Reference, evaluate
from .methods import METHODS, Method, Setting
from .packed import sources
from .plot import plot
from .results import FOLDER, Results, environment
from .runner import Runner, Unavailable
from .subject import LIMIT, Subject
from .table import DOCS, embed, markdown


@dataclass(frozen=True)
class Run:
    """What is measured.

    Attributes:
        name: of the result file.
        contexts: tokens that are prefilled.
        windows: test windows, one a document.
        greedy: tokens of greedy decoding that are compared.
        part: of which methods' ``runs``.
    """

    name: str
    contexts: tuple[int, ...]
    windows: int
    greedy: int
    part: str


SHORT = Run("quality", (2048,), 6, 64, "short")
FULL = Run("quality-full", (2048, 4096, LIMIT - NEXT), 24, 128, "full")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--full", action="store_true", help="2k, 4k, 8k; 24 windows; all methods")
    parser.add_argument("--context", type=int, help="one context length, for our codes only")
    parser.add_argument("--windows", type=int, help="test windows, one a document")
    parser.add_argument("--methods", nargs="*", help="only those with one of these in their names")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--inner", default="aot_eager", help="option inner of the backend")
    parser.add_argument("--minutes", type=float, help="start no cell that would take longer")
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    args = parser.parse_args(arguments)
    most = len(documents("test"))
    if args.windows is not None and not 1 <= args.windows <= most:
        parser.error(f"--windows {args.windows}: accepted is 1 to {most}")
    if args.context is not None and (args.full or not 256 <= args.context <= LIMIT - NEXT):
        parser.error(f"--context {args.context}: accepted is 256 to {LIMIT - NEXT}, without --full")
    if args.device not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: accepted are cpu, cuda")
    if args.inner not in ("inductor", "aot_eager"):
        parser.error(f"--inner {args.inner}: accepted are inductor, aot_eager")
    return args


def chosen(args: argparse.Namespace) -> Run:
    """What the command line asks for."""
    run = FULL if args.full else SHORT
    if args.context is not None:
        run = Run(f"quality-{args.context}", (args.context,), 5, 64, "target")
    return replace(run, windows=args.windows or run.windows)


def methods_of(run: Run, words: list[str] | None) -> list[Method]:
    """The methods of a run, or those of all runs with one of ``words`` in their names."""
    if words:
        return [m for m in METHODS if any(word in m.name for word in words)]
    return [m for m in METHODS if run.part in m.runs]


class Clock:
    """Says when to stop.

    Args:
        minutes: that may pass; None: any.
    """

    def __init__(self, minutes: float | None) -> None:
        self.started = time.monotonic()
        self.limit = float("inf") if minutes is None else 60 * minutes
        self.longest = 0.0

    def has_time(self) -> bool:
        """Whether a cell as long as the longest yet would end in time."""
        return time.monotonic() - self.started + self.longest <= self.limit


def measure(
    run: Run, methods: list[Method], setting: Setting, results: Results, clock: Clock
) -> bool:
    """Measure every cell that is not there yet; False if time ran out first."""
    subject = setting.subject
    texts = windows(subject.tokenizer, "test", run.windows, max(run.contexts) + NEXT)
    texts = texts.to(subject.device)
    references: dict[int, Reference] = {}
    for number, method in enumerate(methods):
        runner: Runner | None = None
        for context in run.contexts:
            if results.has(method.name, context):
                continue
            if not clock.has_time():
                return False
            started = time.monotonic()
            try:
                runner = runner or method.start(setting)
            except Unavailable as reason:
                print(f"{method.name}: left out: {reason}", flush=True)
                break
            if context not in references:
                ids = texts[:, : context + NEXT]
                references[context] = Reference(subject, ids, context, run.greedy)
            scores, cache = evaluate(runner, references[context])
            seconds = time.monotonic() - started
            cell = {
                "method": method.name,
                "family": method.family,
                "context": context,
                **asdict(runner.sizes(cache)),
                **scores.as_json(),
                **runner.notes(),
                "seconds": seconds,
            }
            results.add(cell)
            clock.longest = max(clock.longest, seconds)
            del cache
            print(
                f"{number + 1}/{len(methods)} {method.name}, {context} tokens: "
                f"ratio {cell['ratio']:.2f}, KL {scores.kl.mean:.5f} "
                f"({scores.kl.low:.5f} to {scores.kl.high:.5f}), top-1 {scores.top1.mean:.4f}, "
                f"greedy {scores.greedy.mean:.0f}, pass keys {scores.passkeys.mean:.2f}; "
                f"{seconds:.0f} s",
                flush=True,
            )
        del runner
        gc.collect()
    return True


def publish(results: Results, name: str) -> None:
    """Print the table, put it into the documentation if that has a place for it, and plot."""
    content = json.loads(results.path.read_text(encoding="utf-8"))
    text = markdown(content)
    print(f"\n{text}\n\nwrote {results.path}")
    document = DOCS.read_text(encoding="utf-8") if DOCS.exists() else ""
    if f"<!-- results: {name} -->" in document:
        DOCS.write_text(embed(document, name, text), encoding="utf-8")
        print(f"wrote {DOCS}")
    picture = results.path.with_suffix(".svg")
    if plot(content, picture):
        print(f"wrote {picture}")
    else:
        print("no plot: matplotlib is not installed (pip install -e '.[bench]')")


def main() -> None:
    """Run the benchmark."""
    args = parse(sys.argv[1:])
    run = chosen(args)
    clock = Clock(args.minutes)
    torch.manual_seed(0)
    print("loading SmolLM2-135M-Instruct", flush=True)
    subject = Subject.load(args.device)
    calibration = windows(
        subject.tokenizer, "calibration", len(documents("calibration")), max(run.contexts)
    )
    setting = Setting(subject, calibration.to(subject.device), NEXT, args.inner)
    path = args.output or FOLDER / f"{run.name}.json"
    if args.fresh:
        path.unlink(missing_ok=True)
    settings = {
        "model": "SmolLM2-135M-Instruct, float32",
        "contexts": list(run.contexts),
        "windows": run.windows,
        "next": NEXT,
        "greedy": run.greedy,
        "calibration": list(calibration.shape),
        "inner": args.inner,
    }
    command = " ".join(["python -m benchmarks.quality", *sys.argv[1:]])
    results = Results.resume(path, settings, environment(subject.device), command)
    results.drop_outdated(sources())
    with torch.no_grad():
        complete = measure(run, methods_of(run, args.methods), setting, results, clock)
    if not complete:
        print(f"time is up: the same command again goes on (--minutes {args.minutes:g})")
    if results.cells:
        publish(results, run.name)


if __name__ == "__main__":
    main()
