"""Whole decode steps on a GPU: 8-layer slices with random weights, attentionpack beside the rest.

What each step costs, what of it is the GPU's and what the host's (guards and Hugging Face's
wrapper, our boundary, the compiled graph's launches), and peak memory. Caches are filled without a
prefill: random keys and values are packed as a prefill's would be.

    python benchmarks/decode_step_gpu.py --out benchmarks/results/decode-step-h100.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

from apack_compile.cache import PackedKV, Policy, SideStore
from apack_compile.codec import CodeRef
from apack_compile.runtime.graph import PackedGraph
from apack_compile.runtime.specialise import Specialised

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from attend_gpu import Case, copy_bandwidth, layouts, random_code  # noqa: E402

LAYERS = 8
STEPS = 64
"""In a row: the ring is coded twice meanwhile."""

TOGETHER = 3
"""Variants that are in memory at once."""


class Shape(NamedTuple):
    """Decoder of a model and what it has read."""

    model: str
    batch: int
    tokens: int


SHAPES = {
    "Qwen2.5-VL-7B B8 S32768": Shape("qwen", 8, 32768),
    "LLaVA-1.5-7B B8 S4096": Shape("llava", 8, 4096),
}

MODELS = {
    "qwen": (Qwen2ForCausalLM, Qwen2Config, {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064}),
    "llava": (LlamaForCausalLM, LlamaConfig, {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32064}),
    "tiny": (Qwen2ForCausalLM, Qwen2Config, {
        "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1000}),
}  # fmt: skip


def build(shape: Shape, device: str) -> Any:
    """A slice of the model with random weights in bfloat16."""
    model, config, sizes = MODELS[shape.model]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        made = model(config(num_hidden_layers=LAYERS, max_position_embeddings=65536, **sizes))
    torch.set_default_dtype(torch.float32)
    return made.eval()


def random_tokens(config: Any, shape: Shape, device: str) -> Tensor:
    """Keys or values of one layer."""
    dim = config.hidden_size // config.num_attention_heads
    size = (shape.batch, config.num_key_value_heads, shape.tokens, dim)
    return torch.randn(size, device=device, dtype=torch.bfloat16)


def dense_cache(model: Any, shape: Shape, device: str) -> Any:
    """A cache that grows by ``cat``."""
    cache, x = DynamicCache(config=model.config), random_tokens(model.config, shape, device)
    for i in range(LAYERS):
        cache.update(x.clone(), x.clone(), i)
    return cache


def static_cache(model: Any, shape: Shape, device: str) -> Any:
    """A preallocated cache."""
    cache = StaticCache(config=model.config, max_cache_len=shape.tokens + 512)
    x = random_tokens(model.config, shape, device)
    for i in range(LAYERS):
        cache.update(x.clone(), x.clone(), i)
    return cache


def packed_cache(model: Any, shape: Shape, device: str, mixed: bool) -> Any:
    """A cache of packed random tokens, each layer with a code of its own."""
    c = model.config
    cache, x = DynamicCache(config=c), random_tokens(c, shape, device)
    case = Case(shape.batch, c.num_attention_heads, c.num_key_value_heads, shape.tokens)
    k, v = layouts(case, mixed)
    for i in range(LAYERS):
        sides = [
            PackedKV.of(SideStore.encode(x, CodeRef(random_code(layout, device)), Policy()))
            for layout in (k, v)
        ]
        cache.update(*sides, i)
    return cache


class Watch:
    """Host time spent inside calls of a method, while it is watched."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name, self.inner = owner, name, getattr(owner, name)
        self.seconds = 0.0

    def __enter__(self) -> Watch:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return self.inner(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(self.owner, self.name, timed)
        return self

    def __exit__(self, *_: Any) -> None:
        setattr(self.owner, self.name, self.inner)


def sync(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def step_ms(step: Callable[[], Any], device: str) -> float:
    """Milliseconds a step, steps following each other without a wait: the median of three rows."""
    rows = []
    for _ in range(3):
        sync(device)
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        sync(device)
        rows.append(1e3 * (time.perf_counter() - start) / STEPS)
    return statistics.median(rows)


def host_ms(step: Callable[[], Any], device: str) -> dict[str, float]:
    """Milliseconds until a call returns, the GPU idle when it begins; and where they go."""
    whole, boundary, graph = [], [], []
    for _ in range(10):
        sync(device)
        with Watch(PackedGraph, "__call__") as outer, Watch(Specialised, "__call__") as inner:
            start = time.perf_counter()
            step()
            whole.append(1e3 * (time.perf_counter() - start))
        boundary.append(1e3 * (outer.seconds - inner.seconds))
        graph.append(1e3 * inner.seconds)
    parts = {"host": statistics.median(whole)}
    if any(graph):
        parts |= {"boundary": statistics.median(boundary), "graph": statistics.median(graph)}
        parts["guards and wrapper"] = parts["host"] - parts["boundary"] - parts["graph"]
    return parts


def gpu_ms(step: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of kernels a step, launches, and the kernels that take longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    events = [e for e in trace.key_averages() if e.self_device_time_total]
    events.sort(key=lambda e: -e.self_device_time_total)
    return {
        "gpu": sum(e.self_device_time_total for e in events) / 3e3,
        "launches": sum(e.count for e in events) / 3,
        "kernels": {
            e.key[:60]: [round(e.self_device_time_total / 3e3, 4), e.count / 3] for e in events[:14]
        },
    }


Step = Callable[[], Any]


def prepare(model: Any, cache: Any, shape: Shape, device: str, run: Any) -> tuple[Step, float]:
    """A step, and the seconds that the first ones took; the rest need no compiler."""
    ids = torch.ones(shape.batch, 1, dtype=torch.long, device=device)

    def step() -> Any:
        return run(ids, past_key_values=cache, use_cache=True)

    start = time.perf_counter()
    for _ in range(5):
        step()
    sync(device)
    return step, time.perf_counter() - start


def measure(step: Step, device: str) -> dict[str, Any]:
    """Everything about one variant."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    row: dict[str, Any] = {"ms": step_ms(step, device)} | host_ms(step, device)
    if device == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row |= gpu_ms(step)
    return row


def ours(**options: Any) -> Callable[[Any], Any]:
    """Our backend."""
    return lambda model: torch.compile(model, backend="attentionpack", options=options)


VARIANTS: dict[str, tuple[Callable[[Any], Any], Callable[..., Any]]] = {
    "eager, DynamicCache": (lambda model: model, dense_cache),
    "Inductor, DynamicCache": (torch.compile, dense_cache),
    "Inductor reduce-overhead, StaticCache": (
        lambda model: torch.compile(model, mode="reduce-overhead"), static_cache),
    "attentionpack, 8 bit": (ours(), partial(packed_cache, mixed=False)),
    "attentionpack, mixed": (ours(), partial(packed_cache, mixed=True)),
    "attentionpack uncaptured, 8 bit": (
        ours(inductor={"triton.cudagraphs": False}), partial(packed_cache, mixed=False)),
}  # fmt: skip
"""What runs a step, and what makes its cache."""


def job(shape: Shape, variant: str, barrier: Any, lock: Any, results: Any) -> None:
    """One variant in a process of its own: some compile at once and measure one by one."""
    torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 64
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled, make_cache = VARIANTS[variant]
    step, row = None, {}
    try:
        model = build(shape, device)
        cache = make_cache(model, shape, device)
        row["weight_gb"] = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
        step, row["first_steps_s"] = prepare(model, cache, shape, device, compiled(model))
    except Exception as error:
        row["failed"] = repr(error)[:500]
    barrier.wait()
    with lock:
        try:
            row |= measure(step, device) if step else {}
        except Exception as error:
            row["failed"] = repr(error)[:500]
    results.put((variant, row))


def main() -> None:
    """Measure, print, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--shapes", default="", help="shapes whose name contains this")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a try on a CPU")
    parser.add_argument("--out", type=Path, help="where to write the results")
    args = parser.parse_args()
    shapes = {"tiny": Shape("tiny", 2, 300)} if args.tiny else SHAPES
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": "python " + " ".join(["benchmarks/decode_step_gpu.py", *sys.argv[1:]]),
        "layers": LAYERS,
        "shapes": {},
    }
    if torch.cuda.is_available():
        report |= {"device": torch.cuda.get_device_name(), "copy_gb_s": round(copy_bandwidth())}
        torch.cuda.empty_cache()
    spawn = multiprocessing.get_context("spawn")
    for name, shape in shapes.items():
        if args.shapes not in name:
            continue
        todo = [variant for variant in VARIANTS if args.only in variant]
        rows: dict[str, Any] = {}
        report["shapes"][name] = rows
        for first in range(0, len(todo), TOGETHER):
            some = todo[first : first + TOGETHER]
            barrier, lock, results = spawn.Barrier(len(some)), spawn.Lock(), spawn.Queue()
            jobs = [
                spawn.Process(target=job, args=(shape, variant, barrier, lock, results))
                for variant in some
            ]
            for each in jobs:
                each.start()
            rows.update(results.get() for _ in jobs)
            for each in jobs:
                each.join()
        for variant in todo:
            row = {key: value for key, value in rows[variant].items() if key != "kernels"}
            print(name, "|", variant, "|", json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
