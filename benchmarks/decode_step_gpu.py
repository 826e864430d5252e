"""Whole decode steps on a GPU: 8-layer slices with random weights, attentionpack beside the rest.

What each step costs, what of it is the GPU's and what the host's (guards and Hugging Face's
wrapper, our boundary, the compiled graph's launches), and peak memory. Caches are filled without a
prefill: random keys and values are packed as a prefill's would be.

    python benchmarks/decode_step_gpu.py
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
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
STEPS = 20


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
    cache = StaticCache(config=model.config, max_cache_len=shape.tokens + 3 * STEPS)
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
    """Milliseconds a step, steps following each other without a wait."""
    sync(device)
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    sync(device)
    return 1e3 * (time.perf_counter() - start) / STEPS


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


def measure(model: Any, cache: Any, shape: Shape, device: str, run: Any) -> dict[str, Any]:
    """Everything about one variant."""
    ids = torch.ones(shape.batch, 1, dtype=torch.long, device=device)

    def step() -> Any:
        return run(ids, past_key_values=cache, use_cache=True)

    start = time.perf_counter()
    for _ in range(4):
        step()
    sync(device)
    row: dict[str, Any] = {"first_steps_s": time.perf_counter() - start}
    row["ms"] = step_ms(step, device)
    row |= host_ms(step, device)
    if device == "cuda":
        row |= gpu_ms(step)
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def variants(model: Any) -> dict[str, tuple[Any, Callable[..., Any]]]:
    """What runs a step, and what makes its cache."""
    return {
        "eager, DynamicCache": (lambda: model, dense_cache),
        "Inductor, DynamicCache": (lambda: torch.compile(model), dense_cache),
        "Inductor reduce-overhead, StaticCache": (
            lambda: torch.compile(model, mode="reduce-overhead"), static_cache),
        "attentionpack, 8 bit": (
            lambda: torch.compile(model, backend="attentionpack"),
            lambda *a: packed_cache(*a, mixed=False)),
        "attentionpack, mixed": (
            lambda: torch.compile(model, backend="attentionpack"),
            lambda *a: packed_cache(*a, mixed=True)),
    }  # fmt: skip


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--shapes", default="", help="shapes whose name contains this")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a try on a CPU")
    parser.add_argument("--out", type=Path, help="where to write the results")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = {"tiny": Shape("tiny", 2, 300)} if args.tiny else SHAPES
    torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 64
    report: dict[str, Any] = {"torch": torch.__version__, "layers": LAYERS, "shapes": {}}
    if device == "cuda":
        report |= {"device": torch.cuda.get_device_name(), "copy_gb_s": round(copy_bandwidth())}
    for name, shape in shapes.items():
        if args.shapes not in name:
            continue
        model = build(shape, device)
        weights = 2 * sum(p.numel() for p in model.parameters())
        rows: dict[str, Any] = {"weight_bytes": weights}
        report["shapes"][name] = rows
        for variant, (compiled, make_cache) in variants(model).items():
            if args.only not in variant:
                continue
            torch._dynamo.reset()
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                cache = make_cache(model, shape, device)
                row = measure(model, cache, shape, device, compiled())
            except Exception as error:
                row = {"failed": repr(error)[:500]}
            cache = None
            rows[variant] = row
            print(name, variant, json.dumps(row), flush=True)
        del model
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
