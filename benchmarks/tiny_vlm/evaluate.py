"""Score a trained model and say which gates it passes.

python -m benchmarks.tiny_vlm.evaluate --adapter benchmarks/tiny_vlm/.cache/full/adapter.safetensors
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ..quality.metrics import share
from ..quality.results import FOLDER, environment, rounded
from ..quality.subject import smollm2
from . import adapter, pack
from .ahead import draw, pieces
from .contexts import Contexts
from .prompt import Prompter
from .prose import tokens
from .scoring import exact, follow, forget, prefill
from .tiles import Painter

CELLS = (
    ("caption", 256), ("caption, new pairs", 256), ("which", 512), ("which", 1024),
    ("which", 2048), ("which", 4096), ("which", 8000), ("what", 512), ("what", 1024),
    ("what", 2048), ("what", 4096), ("what", 8000), ("needle", 1024), ("needle", 4096),
    ("needle", 8000), ("read", 1024), ("read", 4096), ("clip", 512),
)  # fmt: skip
"""Tasks and tokens of context."""

CONTROLS = (("which", 1024), ("what", 1024), ("needle", 1024), ("which", 4096), ("what", 4096),
            ("needle", 4096))  # fmt: skip
"""Cells that are also scored with blank images, and with half of the cache gone."""

GATES = {
    ("caption", 256): 0.85, ("which", 1024): 0.95, ("what", 1024): 0.95, ("which", 4096): 0.85,
    ("what", 4096): 0.85, ("needle", 4096): 0.90,
}  # fmt: skip
"""Least share of exact matches."""

PERPLEXITY = 1.05
"""At most so many times SmolLM2's."""

BLANK = 0.05
"""Most share of exact matches on blank images: chance is below 0.03 in all control cells."""

HARM = 0.8
"""Half of the cache gone must leave less than this part of the exact matches."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiny_vlm.evaluate",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("--adapter", type=Path, default=adapter.ADAPTER)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bfloat16", action="store_true", help="weights and cache; else float32")
    parser.add_argument("--contexts", type=int, default=200, help="of each cell")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw")
    parser.add_argument("--longest", type=int, default=8192, help="leave longer contexts out")
    parser.add_argument("--things", type=int, help="as many as the plan trained on")
    parser.add_argument("--output", type=Path, default=FOLDER / "tiny-vlm.json")
    return parser.parse_args(arguments)


def score(model: Any, batch: Contexts, control: bool, seed: int) -> dict[str, list[float]]:
    """Exact matches, one a context, as it is and, if wanted, with its controls."""
    kv = prefill(model, batch)
    caches = {"exact": kv}
    if control:
        caches["half"] = forget(kv, torch.Generator().manual_seed(seed))
        caches["blank"] = prefill(model, batch, blank=True)
    values = {}
    for which, cache in caches.items():
        predicted = follow(model, cache, batch.ids.shape[1], batch.following)
        values[which] = exact(predicted, batch.following, batch.spans)
    return values


def perplexity(model: Any, text: torch.Tensor) -> float:
    """Of prose ``[R, T]``."""
    nats = []
    for row in text.to(model.device).split(4):
        logits = model(row[:, :-1]).logits.float()
        nats.append(functional.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten()))
    return float(torch.stack(nats).mean().exp())


def verdicts(cells: list[dict[str, Any]], ratio: float) -> dict[str, bool]:
    """Which gates are passed; those whose cells were left out are not there."""
    made = {"perplexity": ratio <= PERPLEXITY}
    for cell in cells:
        name = f"{cell['task']} at {cell['context']}"
        least = GATES.get((cell["task"], cell["context"]))
        if least is not None:
            made[name] = cell["exact"]["mean"] >= least
        if "half" in cell:
            made[f"{name}, half forgotten"] = cell["half"]["mean"] < HARM * cell["exact"]["mean"]
            made[f"{name}, blank"] = cell["blank"]["mean"] <= BLANK
    return made


def settings(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """What scores depend on, the adapter by its file."""
    return {
        "adapter": adapter.digest(args.adapter),
        "contexts": args.contexts,
        "dtype": str(dtype),
        "things": args.things,
    }


def main() -> int:
    """Score all cells; 1 if a gate is missed."""
    args = parse(sys.argv[1:])
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    model, tokenizer = adapter.load(args.adapter, dtype)
    model = model.to(args.device)
    painter, prompter = Painter(pack.load(), args.things), Prompter(tokenizer)
    most = len(painter.things["seen"])
    wanted = [
        piece
        for name, length in CELLS
        if length <= args.longest and prompter.images(length) <= most
        for piece in pieces(name, length, args.contexts)
    ]
    cells: list[dict[str, Any]] = []
    with torch.no_grad():
        drawn = draw(painter, prompter, wanted, args.workers)
        for (name, length), group in groupby(drawn, lambda d: (d[0].task, d[0].length)):
            began = time.monotonic()
            values: dict[str, list[float]] = {}
            for piece, batch in group:
                control = (name, length) in CONTROLS
                for which, some in score(model, batch, control, piece.numbers.start).items():
                    values.setdefault(which, []).extend(some)
            cell: dict[str, Any] = {"task": name, "context": length}
            cell |= {w: asdict(share(torch.tensor(v))) for w, v in values.items()}
            cells.append(cell)
            shown = {which: round(cell[which]["mean"], 3) for which in values}
            print(name, length, shown, f"{time.monotonic() - began:.0f} s", flush=True)
        text = tokens(tokenizer, "test")
        text = text[: len(text) // 1024 * 1024].view(-1, 1024)[:: max(1, len(text) // 1024 // 24)]
        before = smollm2.load_model(dtype).to(args.device)
        ratio = perplexity(model, text) / perplexity(before, text)
    passed = verdicts(cells, ratio)
    content = {
        "command": " ".join(["python -m benchmarks.tiny_vlm.evaluate", *sys.argv[1:]]),
        "environment": environment(model.device),
        "settings": settings(args, dtype),
        "perplexity over SmolLM2's": ratio,
        "gates": passed,
        "cells": cells,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rounded(content), indent=1) + "\n", encoding="utf-8")
    for gate, held in passed.items():
        print("passed" if held else "MISSED", gate)
    print(args.output)
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
