"""Measure how well codes of the KV cache keep the outputs of SmolLM2-135M-Instruct.

python -m benchmarks.quality                                              minutes on two cores
python -m benchmarks.quality --context 3072 --windows 5                   our codes, for the targets
python -m benchmarks.quality --full --device cuda --minutes 8             everything; again: go on
python -m benchmarks.quality --paper --device cuda --minutes 8            the paper's settings
python -m benchmarks.quality --questions --device cuda --minutes 8        several about one context

With --subject tiny-vlm: the small vision-language model of benchmarks/tiny_vlm, on albums of
images, of 4,096 tokens or of --context; with --bfloat16 on a GPU, as above.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from apack_compile.options import INNER

from .asking import QuestionSuite
from .documents import documents, windows
from .evaluate import NEXT
from .jobs import Claims, clear, files_of, jobs_that_fit, run_jobs
from .measure import Clock, Run, Suite, measure
from .method import Method
from .methods import METHODS, named
from .packed import sources
from .publish import publish
from .questions import FOLLOWING
from .results import FOLDER, Results, environment
from .runner import Setting
from .subject import LIMIT, Subject

SHORT = Run("quality", (1024,), 4, 64, "short", 4)
FULL = Run("quality-full", (2048, 4096, LIMIT - NEXT), 24, 128, "full", 8)
PAPER = Run("quality-paper", (2048,), 24, 64, "paper", 8)
QUESTIONS = Run("quality-questions", (2048,), 48, 0, "questions", 8)
IMAGES = Run("quality-images", (4096,), 200, 0, "images", 8)
"""One length a run, all of them in one file: a code is fitted for that length."""

NAMED = {"full": FULL, "paper": PAPER, "questions": QUESTIONS}
"""Runs by the option that asks for them."""

LONGEST_ALBUM = 8000
"""Tokens of the longest context of images: what follows has to fit as well."""

HEADS = 9
"""Query heads of SmolLM2-135M."""

ADAPTER = Path(__file__).resolve().parents[1] / "tiny_vlm" / "adapter.safetensors"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--subject", choices=("smollm2", "tiny-vlm"), default="smollm2")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="of tiny-vlm")
    parser.add_argument("--bfloat16", action="store_true", help="tiny-vlm's weights; else float32")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw albums")
    parser.add_argument("--full", action="store_true", help="2k, 4k, 8k; 24 windows; all methods")
    parser.add_argument("--paper", action="store_true", help="the paper's settings, and others")
    parser.add_argument("--questions", action="store_true", help="several about one context")
    parser.add_argument(
        "--context",
        type=int,
        help="tokens; prose: our codes only, one file each; with --paper and --questions: those",
    )
    parser.add_argument("--windows", type=int, help="test windows, one a document; or albums")
    parser.add_argument(
        "--methods", nargs="*", help="only those of these names, or with one of these in them"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--inner", default="aot_eager", help="option inner of the backend")
    parser.add_argument("--minutes", type=float, help="start no cell that would take longer")
    parser.add_argument("--jobs", type=int, help="processes; on cuda as many as its memory holds")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--common", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    parser.add_argument("--keep", action="store_true", help="keep cells that older sources made")
    args = parser.parse_args(arguments)
    albums = args.subject == "tiny-vlm"
    most = 10_000 if albums else len(documents("test"))
    if args.windows is not None and not 1 <= args.windows <= most:
        parser.error(f"--windows {args.windows}: accepted is 1 to {most}")
    longest = LONGEST_ALBUM if albums else LIMIT - NEXT
    shortest = 512 if albums else 256
    if args.context is not None and (args.full or not shortest <= args.context <= longest):
        accepted = f"accepted is {shortest} to {longest}, without --full"
        parser.error(f"--context {args.context}: {accepted}")
    named_runs = [name for name in NAMED if getattr(args, name)]
    if albums and named_runs:
        parser.error(
            f"--{named_runs[0]}: not with --subject tiny-vlm, which has all methods anyway"
        )
    if len(named_runs) > 1:
        parser.error(f"--{named_runs[0]} and --{named_runs[1]}: accepted is one of them")
    if args.device not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: accepted are cpu, cuda")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: accepted is 1 or more")
    if args.inner not in INNER:
        parser.error(f"--inner {args.inner}: accepted are {', '.join(INNER)}")
    return args


def chosen(args: argparse.Namespace) -> Run:
    """What the command line asks for."""
    name = next((name for name in NAMED if getattr(args, name)), None)
    run = NAMED[name] if name else SHORT
    if args.subject == "tiny-vlm":
        contexts = (args.context,) if args.context is not None else IMAGES.contexts
        windows = args.windows or IMAGES.windows
        return replace(
            IMAGES, contexts=contexts, windows=windows, batch=min(IMAGES.batch, windows)
        )  # fmt: skip
    if args.context is not None:
        run = (
            replace(run, name=f"{run.name}-{args.context}", contexts=(args.context,))
            if name
            else Run(f"quality-{args.context}", (args.context,), 5, 64, "target", 5)
        )
    windows = args.windows or run.windows
    return replace(run, windows=windows, batch=min(run.batch if name else windows, windows))


def methods_of(run: Run, words: list[str] | None) -> list[Method]:
    """The methods of a run, or those of all runs that ``words`` name: see :func:`named`."""
    return named(METHODS, words) if words else [m for m in METHODS if run.part in m.runs]


def main() -> int:
    """Run the benchmark; 1 if anything is missing in the end."""
    args = parse(sys.argv[1:])
    run = chosen(args)
    path = args.output or FOLDER / f"{run.name}.json"
    if args.fresh:
        for file in files_of(path):
            file.unlink(missing_ok=True)
    rows = 0 if args.bfloat16 else HEADS * run.batch
    fit = jobs_that_fit(max(run.contexts), rows) if args.device == "cuda" else 1
    jobs = args.jobs or fit
    if args.claims is None and jobs > 1:
        if args.subject == "tiny-vlm":
            prepare(args, run)
        words = without(sys.argv[1:], "--jobs", "--output")
        complete = run_jobs(words, jobs, path, args.minutes)
    else:
        complete = one_job(args, run, path)
        if args.claims is None:
            clear(path)
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
    about = about_images if args.subject == "tiny-vlm" else about_prose
    with torch.no_grad():
        setting, settings, suite = about(args, run)
    command = " ".join(["python -m benchmarks.quality", *sys.argv[1:]])
    here = environment(setting.subject.device)
    files = files_of(args.common or path)
    results = Results.resume(path, settings, here, command, files)
    if not args.keep:
        results.drop_outdated(sources())
    if results.cells and len(files) > 1:
        results.save()  # should there be nothing to add to what a run that was stopped has left
    with torch.no_grad():
        methods = methods_of(run, args.methods)
        return measure(run, methods, setting, results, clock, Claims(args.claims), suite)


def about_prose(args: argparse.Namespace, run: Run) -> tuple[Setting, dict[str, Any], Suite | None]:
    """SmolLM2 on prose: what methods are started with, and what results depend on."""
    print("loading SmolLM2-135M-Instruct", flush=True)
    subject = Subject.load(args.device)
    calibration = windows(
        subject.tokenizer, "calibration", len(documents("calibration")), max(run.contexts)
    )
    asked = run.part == QUESTIONS.part
    following = FOLLOWING if asked else NEXT
    setting = Setting(subject, calibration.to(subject.device), following, args.inner, run.contexts)
    settings = {
        "model": "SmolLM2-135M-Instruct, float32",
        "contexts": list(run.contexts),
        "windows": run.windows,
        "batch": run.batch,
        "next": following,
        "greedy": run.greedy,
        "calibration": list(calibration.shape),
        "inner": args.inner,
    }
    return setting, settings, QuestionSuite(subject, run.windows, run.batch) if asked else None


def about_images(args: argparse.Namespace, run: Run) -> tuple[Setting, dict[str, Any], Suite]:
    """The small vision-language model on albums, and what scores its answers."""
    from ..tiny_vlm import adapter
    from .albums import CALIBRATION, AlbumSetting
    from .answers import AnswerSuite

    albums = prepare(args, run)
    (context,) = run.contexts
    following = albums.at(context).following.shape[1]
    prose = windows(albums.subject.tokenizer, "calibration", CALIBRATION, context)
    setting = AlbumSetting(
        albums.subject, prose.to(albums.subject.device), following, args.inner, run.contexts,
        albums,
    )  # fmt: skip
    settings = {
        "model": f"tiny-vlm, {'bfloat16' if args.bfloat16 else 'float32'}",
        "adapter": adapter.digest(args.adapter),
        "windows": run.windows,
        "calibration": CALIBRATION,
        "inner": args.inner,
    }
    return setting, settings, AnswerSuite(setting, albums, run.batch)


def prepare(args: argparse.Namespace, run: Run) -> Any:
    """The albums of a run: drawn, looked at, and kept for whoever needs them next."""
    from . import albums

    print(f"loading the small vision-language model, {args.adapter}", flush=True)
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    made = albums.load(args.adapter, args.device, dtype, run.windows, args.workers)
    for context in run.contexts:
        made.at(context)
    return made


if __name__ == "__main__":
    sys.exit(main())
