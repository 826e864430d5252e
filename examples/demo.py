"""SmolLM2 answers questions about a long document, and about an album of images.

Each is done with stock torch and with ``torch.compile(model, backend="attentionpack")``; bytes of
the KV cache and speeds are printed beside each other.
"""

from __future__ import annotations

import argparse
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import album
import smollm2  # first: it keeps transformers off the network
import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import apack_compile
from benchmarks.tiny_vlm import sample

DATA = Path(__file__).parent / "data"
QUESTION = "What sum did the tribunal at Geneva award to the United States?"
FACT = "15,500,000"
PAGE = Path(__file__).resolve().parents[1] / "build" / "demo-album.png"


class Clock(BaseStreamer):
    """Notes when ``generate`` starts and when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


@dataclass(frozen=True)
class Run:
    """What one call of ``generate`` made, and when.

    Attributes:
        prompt: tokens of the prompt.
        tokens: the new tokens.
        cache: the KV cache that was left.
        seconds: until the first token, and from each token to the next.
    """

    prompt: int
    tokens: torch.Tensor
    cache: Any
    seconds: list[float]

    @property
    def prefill(self) -> float:
        """Tokens of the prompt a second."""
        return self.prompt / self.seconds[0]

    @property
    def decode(self) -> float:
        """New tokens a second, after the first; not a number if there was only one."""
        steps = self.seconds[1:]
        return len(steps) / sum(steps) if steps else float("nan")


def generate(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int) -> Run:
    """Greedy decoding with a clock."""
    clock = Clock()
    out = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        return_dict_in_generate=True,
    )
    times = clock.times
    seconds = [after - before for before, after in pairwise(times)]
    prompt = inputs["input_ids"].shape[1]
    return Run(prompt, out.sequences[0, prompt:], out.past_key_values, seconds)


@contextmanager
def step(what: str, every: float = 15.0) -> Iterator[None]:
    """Say what is being done, that it still is, and how long it took."""
    start, done = time.perf_counter(), threading.Event()

    def tick() -> None:
        while not done.wait(every):
            say(f"    ... {time.perf_counter() - start:.0f} s")

    say(f"  {what}")
    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
    say(f"    done in {time.perf_counter() - start:.1f} s")


def say(line: str = "") -> None:
    """Print at once, also into a pipe."""
    print(line, flush=True)


def compare(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], new_tokens: int, ratio: float
) -> tuple[Run, Run]:
    """Generate with stock torch, then packed; the packed run that is kept compiles nothing."""
    prompt = inputs["input_ids"].shape[1]
    with step(f"stock torch, eager: prefill of {prompt:,} tokens, then greedy decoding"):
        stock = generate(model, inputs, new_tokens)
    # Codes of an earlier run would be found again: here the fit is part of what is shown.
    options = {"ratio": ratio, "profile_cache": False}
    packed_model: Any = torch.compile(model, backend="attentionpack", options=options)
    with step(
        "attentionpack, first call: the prefill runs uncompiled to fit the codes, then the decode "
        "step is compiled (some minutes)"
    ):
        first = generate(packed_model, inputs, new_tokens)
    fitting, compiling = first.seconds[0], sum(first.seconds[1:2])
    say(f"    fitting prefill {fitting:.1f} s, compiling decode {compiling:.1f} s")
    with step("attentionpack, second call: the prefill is compiled too"):
        second = generate(packed_model, inputs, 2)
    say(f"    compiling prefill {second.seconds[0]:.1f} s, the prefill itself included")
    with step("attentionpack, third call: nothing left to compile; this one is measured"):
        packed = generate(packed_model, inputs, new_tokens)
    return stock, packed


def show(tokenizer: smollm2.Tokenizer, stock: Run, packed: Run, start: str = "") -> None:
    """Answers (which the prompt made to begin with ``start``), bytes and speeds, side by side."""
    for name, run in (("stock", stock), ("packed", packed)):
        say(f"  {name + ':':<8}{start}{tokenizer.decode(run.tokens, skip_special_tokens=True)}")
    same = torch.equal(stock.tokens, packed.tokens)
    say(f"  the same tokens: {'yes' if same else 'no'}")
    say()
    size = apack_compile.cache_bytes(packed.cache)
    kind = "32-bit" if stock.cache.layers[0].keys.dtype == torch.float32 else "16-bit"
    say(f"  {'':<24}{'stock eager':>14}{'attentionpack':>16}")
    for name, left, right in (
        (f"KV cache ({kind} dense)", f"{size.dense / 1e6:.2f} MB", f"{size.packed / 1e6:.2f} MB"),
        ("prefill", f"{stock.prefill:.1f} tok/s", f"{packed.prefill:.1f} tok/s"),
        ("decode", f"{stock.decode:.2f} tok/s", f"{packed.decode:.2f} tok/s"),
    ):
        say(f"  {name:<24}{left:>14}{right:>16}")
    say(f"  cache: {size}")
    say()


def about_document(tokenizer: smollm2.Tokenizer, model: PreTrainedModel, args: Any) -> None:
    """The text job: a question about a document of 4,500 tokens."""
    document = " ".join((DATA / "message-1872.txt").read_text().split())
    ids = smollm2.chat(tokenizer, f"{document}\n\n{QUESTION}")
    say("\n1. A question about a long document (examples/data/message-1872.txt)")
    say(f"  {QUESTION}")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    stock, packed = compare(model, inputs, args.tokens, args.ratio)
    say()
    show(tokenizer, stock, packed)
    found = FACT in tokenizer.decode(packed.tokens)
    say(f"  the document says ${FACT}: the packed answer {'has it' if found else 'LACKS IT'}")
    say(f"\n{apack_compile.report(model)}")


def about_album(args: Any) -> None:
    """The image job: questions about an album, to a small model that learnt to see."""
    say("\n2. Questions about an album of images (examples/data/album.png)")
    shown = sample.load()
    PAGE.parent.mkdir(exist_ok=True)
    shown.page().save(PAGE)
    say(f"  {len(shown.tiles)} images; look at them: {PAGE}")
    try:
        with step("loading SmolLM2 with the vision transformer of benchmarks/tiny_vlm"):
            vlm, tokenizer = album.load()
    except FileNotFoundError as error:
        say(f"  LEFT OUT: {error}")
        return
    say("  Rewritten graphs run operator by operator here: compiling them takes minutes, as above.")
    options = {"ratio": args.ratio, "profile_cache": False, "inner": "eager"}
    packed_vlm: Any = torch.compile(vlm, backend="attentionpack", options=options)
    same = 0
    for number, (question, inputs) in enumerate(album.inputs(tokenizer, shown)):
        with step(question.text + ("" if number else " (the first call learns the codes)")):
            runs = [generate(model, inputs, args.tokens) for model in (vlm, packed_vlm)]
        stock, packed = (tokenizer.decode(r.tokens, skip_special_tokens=True) for r in runs)
        same += stock == packed
        say(f"    right: {question.answer}    dense: {stock}    packed: {packed}")
        size = apack_compile.cache_bytes(runs[1].cache)
    say(f"  the same answer: {same} of {number + 1}")
    say(f"  cache, of {runs[1].prompt} tokens and the answer: {size}")
    summary, _, _ = str(apack_compile.report(vlm)).partition("\n  graph")
    say(f"\n{summary}")


def main() -> None:
    """Run both jobs."""
    parser = argparse.ArgumentParser(description=__doc__, prog="make demo")
    parser.add_argument("--ratio", type=float, default=8, help="of dense 16-bit bytes to coded")
    parser.add_argument("--part", type=int, choices=(1, 2), help="one of both alone")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens at most")
    args = parser.parse_args()
    torch._logging.set_logs(dynamo=logging.ERROR)  # graph breaks are counted in the report
    start = time.perf_counter()
    say(f"torch {torch.__version__}, {torch.get_num_threads()} threads, ratio {args.ratio:g}")
    if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        say("  NOTE: other programs keep this machine busy; expect low and uneven speeds")
    if args.part != 2:
        with step("loading SmolLM2-135M-Instruct: decoding the 4-bit weights"):
            tokenizer, model = smollm2.load_tokenizer(), smollm2.load_model()
        about_document(tokenizer, model, args)
    if args.part != 1:
        about_album(args)
    say(f"\nall done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
