"""Codes of tokens that come behind a prompt: what they cost in a long answer.

Elsewhere in these benchmarks only prompts are coded. Here a short one is, and what follows leaves
the window of recent tokens in blocks and is coded in its turn, as in decoding. KL from the dense
cache over all that follows, through the compiled backend, 16 tokens at a time.

    python -m benchmarks.quality.later_tokens         writes results/later-tokens.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .documents import documents, windows
from .packed import PackedRunner
from .results import environment, write
from .runner import Setting
from .subject import Prompts, Subject

FOLDER = Path(__file__).resolve().parents[1] / "results"

METHODS: dict[str, dict[str, Any]] = {
    "without tiers": {},
    "tiers": {"tiers": True},
    "pre-rope keys": {"k_code": "pre-rope"},
    "pre-rope keys, tiers": {"k_code": "pre-rope", "tiers": True},
}


def measure(runner: PackedRunner, rows: Tensor, context: int) -> dict[str, Any]:
    """KL and top-1 of what follows, and the tokens that were coded on the way.

    Args:
        runner: tokens that follow are coded.
        rows: tokens ``[windows, context + following]``.
        context: of them the prompt.
    """
    kl, same, coded = [], [], 0
    for row in rows.to(runner.subject.device):
        wanted = runner.subject.model(row[None]).logits[0, context:].log_softmax(-1)
        cache = runner.prefill(Prompts(runner.subject, row[None, :context]))
        before = cache.layers[0].values.store.coded
        got, grown = runner.grow(cache, row[None, context:])
        got = got[0].log_softmax(-1)
        coded = grown.layers[0].values.store.coded - before
        kl.append(float((wanted.exp() * (wanted - got)).sum(-1).mean()))
        same.append(float((wanted.argmax(-1) == got.argmax(-1)).float().mean()))
    mean = {"kl": sum(kl) / len(kl), "top1": sum(same) / len(same)}
    return {**mean, "coded_later": coded, "kl_each": kl}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--context", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--following", type=int, default=768)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=8)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=FOLDER / "later-tokens.json")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    subject = Subject.load(args.device)
    length = args.context + args.following
    tests = windows(subject.tokenizer, "test", args.windows, length)
    learnt = windows(subject.tokenizer, "calibration", len(documents("calibration")), length)
    setting = Setting(
        subject, learnt.to(subject.device), args.following, "eager", (args.context, length)
    )
    about = {
        "command": shlex.join(["python", "-m", "benchmarks.quality.later_tokens", *sys.argv[1:]]),
        "context": args.context, "following": args.following, "windows": args.windows,
        "ratio": args.ratio, **environment(subject.device),
    }  # fmt: skip
    found = []
    for name in args.methods:
        options = {"ratio": args.ratio, **METHODS[name]}
        runner = PackedRunner(setting, options, beforehand=True, coded_once=False)
        found.append({"method": name, **measure(runner, tests, args.context)})
        print(json.dumps(found[-1]), flush=True)
        write(args.out, {**about, "rows": found})


if __name__ == "__main__":
    main()
