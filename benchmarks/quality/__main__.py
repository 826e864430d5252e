"""Measure how well codes of the KV cache keep the outputs of SmolLM2-135M-Instruct.

python -m benchmarks.quality                                              minutes on two cores
python -m benchmarks.quality --context 3072 --windows 5                   our codes, for the targets
python -m benchmarks.quality --full --device cuda --minutes 8             everything; again: go on
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from apack_compile.options import INNER

from . import targets
from .documents import documents, windows
from .evaluate import NEXT
from .jobs import Claims, jobs_that_fit, run_jobs
from .measure import Clock, Run, measure
from .methods import METHODS, Method
from .packed import sources
from .plot import plot
from .results import FOLDER, Results, environment
from .runner import Setting
from .subject import LIMIT, Subject
from .table import DOCS, embed, markdown

SHORT = Run("quality", (1024,), 4, 64, "short", 4)
FULL = Run("quality-full", (2048, 4096, LIMIT - NEXT), 24, 128, "full", 8)


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
    parser.add_argument("--jobs", type=int, help="processes; on cuda as many as its memory holds")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    parser.add_argument("--keep", action="store_true", help="keep cells that older sources made")
    args = parser.parse_args(arguments)
    most = len(documents("test"))
    if args.windows is not None and not 1 <= args.windows <= most:
        parser.error(f"--windows {args.windows}: accepted is 1 to {most}")
    if args.context is not None and (args.full or not 256 <= args.context <= LIMIT - NEXT):
        parser.error(f"--context {args.context}: accepted is 256 to {LIMIT - NEXT}, without --full")
    if args.device not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: accepted are cpu, cuda")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: accepted is 1 or more")
    if args.inner not in INNER:
        parser.error(f"--inner {args.inner}: accepted are {', '.join(INNER)}")
    return args


def chosen(args: argparse.Namespace) -> Run:
    """What the command line asks for."""
    run = FULL if args.full else SHORT
    if args.context is not None:
        run = Run(f"quality-{args.context}", (args.context,), 5, 64, "target", 5)
    windows = args.windows or run.windows
    return replace(run, windows=windows, batch=min(run.batch if args.full else windows, windows))


def methods_of(run: Run, words: list[str] | None) -> list[Method]:
    """The methods of a run, or those of all runs with one of ``words`` in their names."""
    if words:
        return [m for m in METHODS if any(word in m.name for word in words)]
    return [m for m in METHODS if run.part in m.runs]


def publish(path: Path, name: str) -> None:
    """Print the table, put it and targets into the documentation where that has places, plot."""
    content = json.loads(path.read_text(encoding="utf-8"))
    text = markdown(content)
    print(f"\n{text}\n\nwrote {path}")
    parts = {name: text, f"{name}-targets": targets.markdown(content)}
    document = DOCS.read_text(encoding="utf-8") if DOCS.exists() else ""
    marked = {n: part for n, part in parts.items() if f"<!-- results: {n} -->" in document}
    for part_name, part in marked.items():
        document = embed(document, part_name, part)
    if marked:
        DOCS.write_text(document, encoding="utf-8")
        print(f"wrote {DOCS}")
    picture = path.with_suffix(".svg")
    if plot(content, picture):
        print(f"wrote {picture}")
    else:
        print("no plot: matplotlib is not installed (pip install -e '.[bench]')")


def main() -> int:
    """Run the benchmark; 1 if anything is missing in the end."""
    args = parse(sys.argv[1:])
    run = chosen(args)
    path = args.output or FOLDER / f"{run.name}.json"
    if args.fresh:
        path.unlink(missing_ok=True)
    jobs = args.jobs or (jobs_that_fit(max(run.contexts)) if args.device == "cuda" else 1)
    if args.claims is None and jobs > 1:
        words = without(sys.argv[1:], "--jobs", "--output")
        complete = run_jobs(words, jobs, path, args.minutes)
    else:
        complete = one_job(args, run, path)
    if args.claims is None and path.exists():
        publish(path, run.name)
    return 0 if complete else 1


def without(words: list[str], *options: str) -> list[str]:
    """A command line without some options that have one value each."""
    kept, skip = [], False
    for word in words:
        name, given, _ = word.partition("=")
        if not skip and name not in options:
            kept.append(word)
        skip = name in options and not given
    return [word for word in kept if word != "--fresh"]


def one_job(args: argparse.Namespace, run: Run, path: Path) -> bool:
    """Measure what the command line asks for; False if not all of it was."""
    clock = Clock(args.minutes)
    torch.manual_seed(0)
    print("loading SmolLM2-135M-Instruct", flush=True)
    subject = Subject.load(args.device)
    calibration = windows(
        subject.tokenizer, "calibration", len(documents("calibration")), max(run.contexts)
    )
    setting = Setting(
        subject, calibration.to(subject.device), NEXT, args.inner, len(run.contexts) > 1
    )
    settings = {
        "model": "SmolLM2-135M-Instruct, float32",
        "contexts": list(run.contexts),
        "windows": run.windows,
        "batch": run.batch,
        "next": NEXT,
        "greedy": run.greedy,
        "calibration": list(calibration.shape),
        "inner": args.inner,
    }
    command = " ".join(["python -m benchmarks.quality", *sys.argv[1:]])
    results = Results.resume(path, settings, environment(subject.device), command)
    if not args.keep:
        results.drop_outdated(sources())
    with torch.no_grad():
        methods = methods_of(run, args.methods)
        return measure(run, methods, setting, results, clock, Claims(args.claims))


if __name__ == "__main__":
    sys.exit(main())
