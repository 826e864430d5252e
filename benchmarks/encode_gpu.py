"""Encoding on a GPU: a whole prefill of one layer, and the oldest tokens of the ring.

A prefill is compared with the layer that it follows, compiled by stock Inductor, in the same run.
The flush of the rings is given for one layer (keys and values) of eight, shared out over the steps
between two flushes. With ``--options`` codes with these options of ``options_gpu.py`` ("all": each
of them), which plain operators make, at the first shape.

    python benchmarks/encode_gpu.py --out FILE
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from apack_compile.cache import Policy, SideStore
from apack_compile.cache.policy import encode_arguments
from apack_compile.codec import CodeRef
from apack_compile.kernels.kinds import sort_tokens
from apack_compile.runtime.flush import Flush

sys.path.insert(0, str(Path(__file__).resolve().parent))
from attend_gpu import DTYPE, Case, layouts, profiled
from options_gpu import SEEN, code_of, variants

SHAPES = [(8, 4096), (1, 4096), (1, 32768)]
HEADS, DIM, LAYERS = 4, 128, 8
PLAIN = ("8 bit", "mixed")


def milliseconds(call: Any, repeats: int = 7) -> float:
    """Median time of one call, the host's part counted where the GPU waits for it."""
    call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[repeats // 2]


def kernels_ms(call: Any, repeats: int = 5) -> dict[str, float]:
    """GPU time of one call by kernel: what a prefill pays, whose host runs ahead of the GPU."""
    return {
        event.key[:60]: event.self_device_time_total / repeats / 1e3
        for event in profiled(call, repeats)
    }


def layer_ms(batch: int, tokens: int) -> float:
    """One decoder layer of the Qwen2.5-VL-7B shape over a whole prompt."""
    config = Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=HEADS
    )
    config._attn_implementation = "sdpa"
    layer = Qwen2DecoderLayer(config, 0).to("cuda", DTYPE).eval()
    x = torch.randn(batch, tokens, 3584, device="cuda", dtype=DTYPE)
    positions = torch.arange(tokens, device="cuda")[None]
    turns = Qwen2RotaryEmbedding(config).to("cuda")(x, positions)
    compiled = torch.compile(layer)
    return milliseconds(lambda: compiled(x, position_embeddings=turns, position_ids=positions), 5)


def codes(batch: int, tokens: int, kind: str) -> tuple[Any, Any]:
    """Layouts of keys and values: 8 bit, mixed, or those of an option."""
    case = Case(batch, 28, HEADS, tokens)
    if kind in PLAIN:
        return layouts(case, kind == "mixed")
    return variants(*layouts(case, mixed=True))[kind]


def told(batch: int, tokens: int, layout: Any) -> tuple[Any, Any]:
    """Importance, and which tokens are visual, as far as the code asks for them."""
    importance = torch.rand(batch, tokens, device="cuda")
    visual = importance < SEEN if layout.plane_kinds else None
    return importance if layout.weighs else None, visual


def prefill(batch: int, tokens: int, kind: str) -> dict[str, Any]:
    """Keys and values of one layer: time by the clock, with the host's part, and of the GPU alone;
    the most memory above what goes in."""
    x = torch.randn(batch, HEADS, tokens, DIM, device="cuda", dtype=DTYPE)
    policy = Policy()
    given: list[tuple[Any, ...]] = []
    for layout in codes(batch, tokens, kind):
        importance, visual = told(batch, tokens, layout)
        sorted_ = None
        if visual is not None:
            found = sort_tokens(visual, tokens - policy.window, policy.chunk)
            sorted_ = list(found.tensors(x.device))
        arguments = encode_arguments(CodeRef(code_of(layout, "cuda")), policy, x.device)
        given.append((*arguments, importance, sorted_))

    def both(x: Tensor) -> list[list[Tensor]]:
        return [torch.ops.apack.encode(x, None, *arguments) for arguments in given]

    compiled = torch.compile(both)
    ms = milliseconds(lambda: compiled(x))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    compiled(x)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    kernels = kernels_ms(lambda: compiled(x))
    return {
        "ms": ms, "gpu_ms": sum(kernels.values()), "kernels_ms": kernels, "peak_mb": peak / 1e6,
    }  # fmt: skip


def flush(batch: int, tokens: int, kind: str) -> dict[str, float]:
    """What coding the oldest tokens of the rings costs a step, for one layer: GPU and host.

    Together: all layers by one CUDA graph, as decode does it; mean over flushes, captures and the
    growth of payloads among them. Alone: one store after the other, median.
    """
    x = torch.randn(batch, HEADS, tokens, DIM, device="cuda", dtype=DTYPE)
    policy = Policy()
    stores = [
        SideStore.encode(
            x, CodeRef(code_of(layout, "cuda")), policy, None, *told(batch, tokens, layout)
        )
        for layout in codes(batch, tokens, kind) * LAYERS
    ]
    new = torch.randn(batch, HEADS, policy.block, DIM, device="cuda", dtype=DTYPE)
    together = Flush(capture=True)
    counts = [policy.block] * len(stores)

    def one_by_one() -> None:
        for store in stores:
            store.reserve(policy.block)

    def timed(call: Any, repeats: int) -> list[float]:
        """Seconds of each flush; then tokens to fill the rings again."""
        times = []
        for _ in range(repeats):
            for store in stores:
                store.side.ring[:, :, store.recent : store.recent + policy.block] = new
                if store.importance is not None:
                    store.importance.uniform_()
                store.advance(policy.block)
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return times

    timed(one_by_one, 3)
    alone = sorted(timed(one_by_one, 7))[3]
    timed(lambda: together(stores, counts), 3)
    all_of_them = timed(lambda: together(stores, counts), 64)
    share = 1e6 / (policy.block * LAYERS)
    return {
        "us_a_step": share * sum(all_of_them) / len(all_of_them),
        "us_a_step_median": share * sorted(all_of_them)[32],
        "us_a_step_alone": share * alone,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--options", nargs="+", help="codes with these alone; all: with each")
    parser.add_argument("--out", type=Path, help="where to write the results")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": " ".join(["python", "benchmarks/encode_gpu.py", *sys.argv[1:]]),
        "rows": [],
    }
    kinds: Sequence[str] = args.options or PLAIN
    if kinds == ["all"]:
        kinds = list(variants(*layouts(Case(SHAPES[0][0], 28, HEADS, SHAPES[0][1]), mixed=True)))
    for batch, tokens in SHAPES[:1] if args.options else SHAPES:
        layer = layer_ms(batch, tokens)
        for kind in kinds:
            row: dict[str, Any] = {"batch": batch, "tokens": tokens, "codes": kind}
            row["layer_ms"] = layer
            row["encode"] = prefill(batch, tokens, kind)
            row["share"] = row["encode"]["ms"] / layer
            row["gpu_share"] = row["encode"]["gpu_ms"] / layer
            row["flush"] = flush(batch, tokens, kind)
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                args.out.write_text(json.dumps(report, indent=1) + "\n")
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
