"""Train the small vision-language model.

python -m benchmarks.tiny_vlm.train --plan toy --minutes 10                  on one core, to try it
python -m benchmarks.tiny_vlm.train --minutes 20 --device cuda --compile --workers 14
python -m benchmarks.tiny_vlm.train ... --stop-after 9                       in parts; again: go on
python -m benchmarks.tiny_vlm.train --plan more --start ADAPTER --minutes 12 ...    from an adapter
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from ..quality.subject import smollm2
from . import adapter, pack
from .curve import plot
from .plans import PLANS
from .schedule import Budget
from .tiles import Painter
from .trainer import Point, Trainer

CHECKPOINT = "checkpoint.pt"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiny_vlm.train", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--plan", choices=PLANS, default="full", help="sizes, stages and tasks")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="of the whole training, over all calls")
    length.add_argument("--steps", type=int, help="of the whole training, instead")
    parser.add_argument("--stop-after", type=float, help="minutes of this call", default=1e9)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw")
    parser.add_argument("--compile", action="store_true", help="compile layers with Inductor")
    parser.add_argument("--fresh", action="store_true", help="do not go on, begin")
    parser.add_argument("--start", type=Path, help="an adapter to begin with, not at random")
    parser.add_argument("--keep-every", type=float, default=2, help="minutes between checkpoints")
    parser.add_argument("--folder", type=Path, help="for checkpoint, curve and adapter")
    return parser.parse_args(arguments)


def main() -> int:
    """Train; 0 if the training is complete, 3 if it has to go on in another call."""
    began = time.monotonic()
    args = parse(sys.argv[1:])
    plan = PLANS[args.plan]
    folder = args.folder or pack.CACHE / args.plan
    checkpoint = folder / CHECKPOINT
    torch.set_float32_matmul_precision("high")
    painter = Painter(pack.load(), plan.things)
    trainer = Trainer(
        plan, smollm2.load_model(), smollm2.load_tokenizer(), painter, torch.device(args.device),
        args.workers, args.compile,
    )  # fmt: skip
    if args.start is not None:
        adapter.restore(trainer.model, args.start)
    if checkpoint.exists() and not args.fresh:
        trainer.resume(checkpoint)
        print(f"going on in stage {trainer.stage} behind step {trainer.step}", flush=True)
    budget = Budget(args.minutes, args.steps)
    end = began + args.stop_after * 60
    kept = time.monotonic()

    def stop() -> bool:
        nonlocal kept
        if time.monotonic() - kept > args.keep_every * 60:
            keep(trainer, folder)
            kept = time.monotonic()
        return time.monotonic() >= end

    complete = trainer.run(budget, stop, show)
    keep(trainer, folder)
    plot(trainer.curve, folder / "curve.svg")
    if torch.cuda.is_available():
        print(f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory at most")
    print("complete" if complete else "not complete: run it again", folder)
    return 0 if complete else 3


def keep(trainer: Trainer, folder: Path) -> None:
    """Write what going on needs, the adapter as it is now, and the curve."""
    trainer.save(folder / CHECKPOINT)
    adapter.save(trainer.model, trainer.plan.sizes, folder / "adapter.safetensors")
    (folder / "curve.json").write_text(json.dumps(trainer.curve, indent=0), encoding="utf-8")


def show(point: Point) -> None:
    """Print a point of the curve."""
    words = [f"{name} {value:.4g}" for name, value in point.items() if name != "stage"]
    print(point["stage"], *words, sep="  ", flush=True)


if __name__ == "__main__":
    sys.exit(main())
