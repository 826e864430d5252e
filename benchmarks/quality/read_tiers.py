"""Read-time tiers, simulated: blocks that receive little attention are read in part.

A block of coded tokens is read whole if its running share of the attention (AttentionPack, 3.2:
I <- a I + (1 - a) mass, a = 0.25 a query) is at least ``times`` that of an even share, so that at
most one in ``times`` is; of the others only components of 4 bits and more are read. Or values of
blocks are not read at all where no head gives any of their tokens a weight of ``times``. Nothing is
faster here: it shows what this would cost in quality, through the compiled backend.

    python -m benchmarks.quality.read_tiers --device cuda      writes results/read-tiers.json
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from apack_compile.codec import TransformLayout

from .documents import documents, windows
from .evaluate import NEXT
from .packed import PIECE, PackedRunner
from .results import environment, write
from .runner import Setting
from .subject import Prompts, Subject

FOLDER = Path(__file__).resolve().parents[1] / "results"

KEEP = 0.25
"""Of the importance that a token had before a query, what is kept behind it: the paper's."""

LEADING, NONE = 4, 9
"""Bits of the components that are always read; more than any has."""

SPLIT = 1024
"""Tokens of a program of a kernel, some: those of 8 sequences of 32,768, four KV heads of 128."""


@dataclass(frozen=True)
class Reading:
    """Which blocks are read whole.

    Attributes:
        sides: "kv", "k" or "v": of which only leading components are read elsewhere.
        block: tokens of a block.
        times: an even share of the attention that a block must have to be read whole; by weights,
            a weight.
        by: "running" importance; or, for values, what this very query gives ("now"), averaged over
            heads and queries of a piece or, "now, by head", one by one. Nothing could know those.
            "weight": values of blocks whose largest weight, of any head of this query, is less than
            ``times`` are not read, and are the mean. "weight in split": less than ``times`` the
            largest of the ``SPLIT`` tokens around them, which is more than a program of a kernel
            knows (what came before).
    """

    sides: str
    block: int
    times: float
    by: str = "running"


@dataclass
class Lens:
    """Reads codes of the plain functions by a :class:`Reading`.

    Attributes:
        reading: None: everything is read whole.
        coded: coded tokens of a sequence.
    """

    coded: int
    reading: Reading | None = None
    importance: dict[int, Tensor] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)
    _whole: Tensor | None = None
    _layer: int = 0

    @contextmanager
    def on(self) -> Iterator[Lens]:
        """Attention to transform codes goes through this lens."""
        scores, mix = TransformLayout.scores, TransformLayout.mix

        def seen_scores(
            layout: TransformLayout, q: Tensor, payload: Any, params: Any, at: Any = None
        ) -> Tensor:
            full = scores(layout, q, payload, params, at)
            r = self.reading
            if r is None:
                return full
            self._layer, blocks = payload[0].data_ptr(), -(-full.shape[-1] // r.block)
            known = self.importance.setdefault(
                self._layer, torch.ones(len(full), blocks, device=q.device)
            )
            self._whole = self._spread(known >= r.times / self._blocks(), full.shape[-1])
            if r.by == "running":
                self.shares.append(float(self._whole[..., : self.coded].float().mean()))
            if "k" not in r.sides:
                return full
            with _leading():
                part = scores(layout, q, payload, params, at)
            return torch.where(self._whole, full, part)

        def seen_mix(layout: TransformLayout, p: Tensor, payload: Any, params: Any) -> Tensor:
            r = self.reading
            if r is None:
                return mix(layout, p, payload, params)
            whole, tokens = self._whole, p.shape[-1]
            blocks = -(-tokens // r.block)
            padded = torch.nn.functional.pad(p, (0, blocks * r.block - tokens))
            mass = padded.unflatten(3, (blocks, r.block)).sum(4)  # [B, Hq, Q, blocks]
            kept = KEEP ** p.shape[2]
            mean = mass.mean((1, 2))
            known = self.importance[self._layer]
            self.importance[self._layer] = kept * known + (1 - kept) * mean
            if "v" not in r.sides:
                return mix(layout, p, payload, params)
            if r.by.startswith("weight"):
                most = padded.unflatten(3, (blocks, r.block)).amax((1, 4))  # [B, Q, blocks]
                wanted = torch.full_like(most, r.times)
                if r.by == "weight in split":
                    per = SPLIT // r.block
                    even = torch.nn.functional.pad(most, (0, -blocks % per))
                    largest = even.unflatten(2, (-1, per)).amax(3)
                    wanted = r.times * largest.repeat_interleave(per, 2)[..., :blocks]
                read = self._spread((most >= wanted)[:, None], tokens)  # [B, 1, Q, tokens]
                self.shares.append(float(read[..., : self.coded].float().mean()))
                out = mix(layout, torch.where(read, p, 0.0), payload, params)
                with _leading(NONE):
                    return out + mix(layout, torch.where(read, 0.0, p), payload, params)
            if r.by != "running":
                now = mass if r.by == "now, by head" else mean[:, None, None]
                whole = self._spread(now >= r.times / self._blocks(), tokens)
                self.shares.append(float(whole[..., : self.coded].float().mean()))
            assert whole is not None
            out = mix(layout, torch.where(whole, p, 0.0), payload, params)
            with _leading():
                return out + mix(layout, torch.where(whole, 0.0, p), payload, params)

        with patch.multiple(TransformLayout, scores=seen_scores, mix=seen_mix):
            yield self

    def _blocks(self) -> int:
        assert self.reading is not None
        return max(self.coded // self.reading.block, 1)

    def _spread(self, blocks: Tensor, tokens: int) -> Tensor:
        """Of each block to each of its tokens: ``[B, 1|Hq, 1|Q, tokens]``."""
        assert self.reading is not None
        blocks = blocks[:, None, None] if blocks.dim() == 2 else blocks
        return blocks.repeat_interleave(self.reading.block, -1)[..., :tokens]


@contextmanager
def _leading(least: int = LEADING) -> Iterator[None]:
    """Components of less than ``least`` bits are what they are in the mean."""
    codes = TransformLayout._codes

    def leading(layout: TransformLayout, payload: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        read = codes(layout, payload, dtype)
        count = sum(n for bits, n in layout.runs if bits >= least)
        middle = -layout._centres(read)[count:]
        return torch.cat((read[..., :count], middle.expand(*read.shape[:-1], -1)), -1)

    with patch.object(TransformLayout, "_codes", leading):
        yield


READINGS = (
    *(Reading(side, block, times) for block in (64, 16) for side in "kv" for times in (1, 2, 4)),
    Reading("kv", 64, 1), Reading("k", 64, 1e9), Reading("v", 64, 1e9),
    *(Reading("v", block, 1, by) for block in (64, 1) for by in ("now", "now, by head")),
    *(Reading("v", 64, least, "weight") for least in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)),
    *(Reading("v", 64, least, "weight in split") for least in (3e-2, 1e-2, 1e-3)),
)  # fmt: skip
"""A threshold of 1e9: nothing is read whole."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--context", type=int, default=3072)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--ratio", type=float, default=8)
    parser.add_argument("--by", default="", help="only readings whose `by` begins so")
    parser.add_argument("--out", type=Path, default=FOLDER / "read-tiers.json")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    subject = Subject.load(args.device)
    tests = windows(subject.tokenizer, "test", args.windows, args.context + NEXT)
    learnt = windows(
        subject.tokenizer, "calibration", len(documents("calibration")), args.context
    ).to(subject.device)
    setting = Setting(subject, learnt, NEXT, "eager", (args.context,))
    runner = PackedRunner(setting, {"ratio": args.ratio}, beforehand=True, coded_once=True)
    dense, caches = [], []
    for row in tests.to(subject.device):
        dense.append(subject.model(row[None]).logits[0, args.context :].log_softmax(-1))
        prompts = Prompts(subject, row[None, : args.context])
        caches.append(runner.prefill(prompts))
    coded = caches[0].layers[0].keys.store.coded
    rows = []
    with Lens(coded).on() as lens:
        for reading in (None, *(r for r in READINGS if r.by.startswith(args.by))):
            lens.reading, lens.shares = reading, []
            kl, same = [], []
            for row, cache, wanted in zip(tests, caches, dense, strict=True):
                lens.importance.clear()
                got = runner.follow(
                    copy.deepcopy(cache), row[None, args.context :].to(wanted.device)
                )
                got = got[0, PIECE:].log_softmax(-1)  # before, everything is read whole
                wanted = wanted[PIECE:]
                kl.append(float((wanted.exp() * (wanted - got)).sum(-1).mean()))
                same.append(float((wanted.argmax(-1) == got.argmax(-1)).float().mean()))
            whole = sum(lens.shares) / len(lens.shares) if lens.shares else 1.0
            found = {"kl": sum(kl) / len(kl), "top1": sum(same) / len(same), "whole": whole}
            rows.append({**(asdict(reading) if reading else {}), **found})
            print(json.dumps(rows[-1]), flush=True)
    about = {
        "command": " ".join(["python -m benchmarks.quality.read_tiers", *sys.argv[1:]]),
        "context": args.context, "windows": args.windows, "ratio": args.ratio,
        **environment(subject.device),
    }  # fmt: skip
    write(args.out, {**about, "rows": rows})


if __name__ == "__main__":
    main()
