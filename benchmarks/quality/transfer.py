"""Do bases of text serve images, and the other way round? On the small vision-language model.

python -m benchmarks.quality.transfer --device cuda --bfloat16 --workers 14 --minutes 9

Two measurements, on albums and on prose. With the codec's own functions (``bases.py``): one basis
for both kinds of tokens, one each, that of the other kind, one of each sequence. Through the
compiled backend: codes that ``apack_compile.fit`` fits on albums, on prose, on both. The same
command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from apack_compile.options import INNER

from ..tiny_vlm import adapter
from . import bases
from .albums import CALIBRATION, Albums, AlbumSetting, load
from .answers import AnswerSuite
from .bases import BasisRunner
from .documents import windows
from .evaluate import NEXT
from .jobs import Claims
from .measure import Clock, References, Run, Suite, measure
from .method import Method
from .methods import BEST, named
from .packed import PackedRunner, sources
from .publish import publish
from .results import FOLDER, Results, environment
from .runner import Runner, Setting
from .subject import Inputs, Prompts

ADAPTER = Path(__file__).resolve().parents[1] / "tiny_vlm" / "adapter.safetensors"

RATIO = 8

Source = Literal["albums", "prose", "both"]


@dataclass(frozen=True)
class SourceSetting(AlbumSetting):
    """A setting whose calibration prompts are of one kind, or of both in turn.

    Attributes:
        source: which.
    """

    source: Source = "albums"

    def calibration(self, length: int) -> list[Inputs]:
        """Albums with questions, windows of prose, or half as many of each: of about one length."""
        images = self.albums.calibration(length)
        prose = Setting.calibration(self, length)
        if self.source == "both":
            half = CALIBRATION // 2
            return [
                batch for pair in zip(images[:half], prose[:half], strict=True) for batch in pair
            ]
        return images if self.source == "albums" else prose


class Lab:
    """Codes for :class:`BasisRunner`, all of calibration prompts.

    Args:
        setting: the model and its calibration prompts.
        context: tokens of a context.
    """

    def __init__(self, setting: AlbumSetting, context: int) -> None:
        subject, albums = setting.subject, setting.albums
        self.setting = setting
        image_id = albums.prompter.image_id
        batch = albums.others(context)
        visual = (batch.ids == image_id).to(subject.device)
        seen = Prompts(subject, albums.embedded(batch)).layers
        self.text, self.visual = bases.sums(seen, ~visual), bases.sums(seen, visual)
        self.prose = bases.sums(Prompts(subject, setting.prompts[:, :context]).layers)
        count = albums.at(context).prompts.shape[1]
        ids = torch.tensor(albums.prompter.album(albums.prompter.images(count)))
        self.masks: dict[int, Tensor] = {len(ids): ids == image_id}

    def runner(self, text: str, visual: str) -> BasisRunner:
        """Codes of two kinds of tokens by name; "own": of each sequence."""
        if "own" in (text, visual):
            return BasisRunner(self.setting.subject, RATIO, None, None, self.masks)
        kinds = {
            "both": bases.total([self.text, self.visual]),
            "album text": self.text, "images": self.visual, "prose": self.prose,
        }  # fmt: skip
        dim = self.setting.subject.dim
        found = {name: bases.codes(kinds[name], dim, RATIO) for name in {text, visual}}
        return BasisRunner(self.setting.subject, RATIO, found[text], found[visual], self.masks)


BASES = {
    "one basis for both": ("both", "both"),
    "one each": ("album text", "images"),
    "prose on both": ("prose", "prose"),
    "images on both": ("images", "images"),
    "prose on images": ("both", "prose"),
    "images on text": ("images", "both"),
    "one of each sequence": ("own", "own"),
}
"""Of the text and of the visual tokens of an album; "one basis for both" is of all its tokens."""


def lab(setting: AlbumSetting, context: int) -> Iterator[Method]:
    """What is measured with bases of our choice."""
    made: list[Lab] = []
    for name, pair in BASES.items():

        def start(_: Setting, pair: tuple[str, str] = pair) -> Runner:
            if not made:
                made.append(Lab(setting, context))
            return made[0].runner(*pair)

        yield Method(f"bases: {name}", "bases", frozenset(), start)


def fitted(source: Source, options: dict[str, Any]) -> Method:
    """The backend's codes, fitted beforehand on one kind of prompts: once, for all suites."""
    made: list[Runner] = []

    def start(setting: Setting) -> Runner:
        assert isinstance(setting, SourceSetting)
        if not made:
            own = replace(setting, source=source)
            made.append(PackedRunner(own, {"ratio": RATIO, **options}, True, True))
        return made[0]

    keys = ", pre-RoPE K" if options else ""
    name = f"attentionpack {RATIO}x{keys}, fitted on {source}"
    return Method(name, "attentionpack", frozenset(), start)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.transfer", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--adapter", type=Path, default=ADAPTER)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="weights and cache; else float32")
    parser.add_argument("--context", type=int, default=2048, help="tokens")
    parser.add_argument("--windows", type=int, default=200, help="albums")
    parser.add_argument("--documents", type=int, default=24, help="windows of prose")
    parser.add_argument(
        "--methods", nargs="*", help="only those of these names, or with one of these in them"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that draw")
    parser.add_argument("--inner", choices=INNER, default="eager")
    parser.add_argument("--minutes", type=float, help="start no cell that would take longer")
    parser.add_argument("--output", type=Path, default=FOLDER / "transfer.json")
    return parser.parse_args(arguments)


def main() -> int:
    """Measure; 1 if anything is missing in the end."""
    args = parse(sys.argv[1:])
    clock = Clock(args.minutes)
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    albums: Albums = load(args.adapter, args.device, dtype, args.windows, args.workers)
    subject = albums.subject
    prose = windows(subject.tokenizer, "calibration", CALIBRATION, args.context)
    setting = SourceSetting(
        subject, prose.to(subject.device), NEXT, args.inner, (args.context,), albums
    )
    settings = {
        "model": f"tiny-vlm, {dtype}", "adapter": adapter.digest(args.adapter),
        "ratio": RATIO, "context": args.context,
    }  # fmt: skip
    command = " ".join(["python -m benchmarks.quality.transfer", *sys.argv[1:]])

    def opened(run: Run) -> Results:
        path = args.output.with_stem(f"{args.output.stem}-{run.name}")
        about = {**settings, "windows": run.windows}
        made = Results.resume(path, about, environment(subject.device), command)
        made.drop_outdated(sources())
        return made

    size = min(25, args.windows)
    about_albums = Run("albums", (args.context,), args.windows, 0, "", size)
    about_prose = Run("prose", (args.context,), args.documents, 64, "", min(8, args.documents))
    everywhere: tuple[Source, ...] = ("albums", "prose", "both")
    laboratory = list(lab(setting, args.context))
    backend = [fitted(source, options) for options in ({}, BEST) for source in everywhere]
    if args.methods:
        laboratory, backend = named(laboratory, args.methods), named(backend, args.methods)
    with torch.no_grad():
        images: Suite = AnswerSuite(setting, albums, size)
        results = opened(about_albums)
        complete = measure(
            about_albums, laboratory, setting, results, clock, Claims(None), images
        )  # fmt: skip
        suites = (
            (about_albums, images, results),
            (about_prose, References(about_prose, setting), opened(about_prose)),
        )
        while backend:
            method = backend.pop(0)  # gone with all that it compiled before the next one starts
            for run, suite, kept in suites:
                complete &= measure(run, [method], setting, kept, clock, Claims(None), suite)
            del method
    for name in ("albums", "prose"):
        path = args.output.with_stem(f"{args.output.stem}-{name}")
        if path.exists():
            publish(path, path.stem, picture=False)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
