"""Decode on the CPU: attentionpack beside stock Inductor and eager, in one run.

SmolLM2-135M-Instruct reads a prompt and decodes a fixed continuation, token by token, with a
DynamicCache. Prints a table, and writes benchmarks/results/decode_cpu.json with --save.

    python benchmarks/decode_cpu.py --tokens 4096 --steps 40 --save
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import apack_compile

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))
from smollm2 import load_model, load_tokenizer  # noqa: E402

CASES: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {"backend": "inductor"},
    "attentionpack ratio 4": {"backend": "attentionpack", "options": {"ratio": 4}},
    "attentionpack ratio 8": {"backend": "attentionpack", "options": {"ratio": 8}},
}


def text_tokens(tokenizer: Any, count: int) -> torch.Tensor:
    """The first ``count`` tokens of the example document, repeated if it is too short."""
    document = next((HERE.parent / "examples" / "data").glob("*.txt")).read_text(encoding="utf-8")
    ids = tokenizer(document, return_tensors="pt", add_special_tokens=False).input_ids
    return ids.repeat(1, -(-count // ids.shape[1]))[:, :count]


def run(model: Any, prompt: torch.Tensor, following: torch.Tensor) -> dict[str, Any]:
    """Prefill ``prompt``, then feed ``following`` token by token; seconds and logits."""
    cache = transformers.DynamicCache()
    started = time.perf_counter()
    model(prompt, past_key_values=cache, logits_to_keep=1)
    prefill = time.perf_counter() - started
    steps, logits = [], []
    for token in following.split(1, dim=1):
        started = time.perf_counter()
        logits.append(model(token, past_key_values=cache).logits[0, -1])
        steps.append(time.perf_counter() - started)
    settled = steps[4:]  # compilation happens in the first steps
    return {
        "first_prefill_s": prefill,
        "compile_s": sum(steps[:4]),
        "step_ms_median": 1000 * statistics.median(settled),
        "step_ms_min": 1000 * min(settled),
        "logits": torch.stack(logits),
        "bytes": apack_compile.cache_bytes(cache),
    }


def main() -> None:
    """Run all cases and print them beside each other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096, help="context length")
    parser.add_argument("--steps", type=int, default=40, help="decode steps")
    parser.add_argument("--save", action="store_true", help="write the result file")
    args = parser.parse_args()
    print("loading SmolLM2-135M-Instruct", flush=True)
    model = load_model()
    ids = text_tokens(load_tokenizer(), args.tokens + args.steps)
    prompt, following = ids[:, : args.tokens], ids[:, args.tokens :]
    rows: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for name, settings in CASES.items():
            torch._dynamo.reset()
            model._compiled_call_impl = None
            if settings is not None:
                model.compile(**settings)
            print(f"{name} ...", flush=True)
            rows[name] = run(model, prompt, following)
    reference = rows["eager"].pop("logits").log_softmax(-1)
    stock = rows["inductor"]["step_ms_median"]
    print(
        f"\n{args.tokens} tokens of context, {args.steps} steps, {torch.get_num_threads()} threads"
    )
    print(f"{'':24}{'step, median':>14}{'of Inductor':>13}{'KL':>10}{'top-1':>8}{'cache':>10}")
    for name, row in rows.items():
        logits = row.pop("logits", None)
        scores = reference if logits is None else logits.log_softmax(-1)
        row["kl"] = float((reference.exp() * (reference - scores)).sum(-1).mean())
        row["top1"] = float((reference.argmax(-1) == scores.argmax(-1)).float().mean())
        count = row.pop("bytes")
        row["cache_bytes"], row["dense_bytes"] = count.packed, count.dense
        print(
            f"{name:24}{row['step_ms_median']:11.1f} ms{row['step_ms_median'] / stock:12.2f}x"
            f"{row['kl']:10.4f}{row['top1']:8.3f}{row['cache_bytes'] / 1e6:7.1f} MB"
        )
    if args.save:
        target = HERE / "results" / "decode_cpu.json"
        target.write_text(json.dumps(_result(args, rows), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {target.relative_to(HERE.parent)}")


def _result(args: argparse.Namespace, rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "python " + " ".join(["benchmarks/decode_cpu.py", *sys.argv[1:]]),
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "attentionpack": apack_compile.__version__,
            "python": platform.python_version(),
        },
        "rows": rows,
    }


if __name__ == "__main__":
    main()
