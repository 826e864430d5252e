"""Packed attention of one decode step on a GPU, beside dense attention, in one run.

Codes are random and take 8 times fewer bytes than bfloat16; time does not depend on their values.
Every figure is the median over replays of a CUDA graph, so that launches cost what they cost in a
captured decode step. Where a case fits into the cache, several copies of it take turns.

    python benchmarks/attend_gpu.py            writes benchmarks/results/attend-<device>.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from apack_compile.cache import Policy
from apack_compile.codec import Code, TransformLayout
from apack_compile.codec.quantiser import tailed_quantiser
from apack_compile.codec.spectrum import head_groups
from apack_compile.cost import PackedSide, device_named, seconds_of
from apack_compile.kernels.triton.launch import attend_packed
from apack_compile.kernels.triton.plan import Config

RESULTS = Path(__file__).resolve().parent / "results"
DTYPE, DIM, RING, LIVE = torch.bfloat16, 128, 96, 80
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Case(NamedTuple):
    """One shape: batch, query heads, KV heads, tokens."""

    batch: int
    q_heads: int
    heads: int
    tokens: int


CASES = {
    "B8 28/4 S32768": Case(8, 28, 4, 32768),
    "B8 32/8 S32768": Case(8, 32, 8, 32768),
    "B8 32/32 S8192": Case(8, 32, 32, 8192),
    "B1 28/4 S4096": Case(1, 28, 4, 4096),
    "B1 28/4 S1024": Case(1, 28, 4, 1024),
}
SWEEP = {f"B8 28/4 S{tokens}": Case(8, 28, 4, tokens) for tokens in (1024, 4096, 8192, 16384)}
"""Further context lengths of the first case, for the plots."""


def layouts(case: Case, mixed: bool) -> tuple[TransformLayout, TransformLayout]:
    """Codes of keys and of values, with a gain, at ratio 8."""
    groups = head_groups(case.heads, DIM)
    size = 2 * case.heads * DIM // groups // 8  # bytes of a token of one side of one group
    runs = [(size, 0, 0), (size - 16, 0, 0)]
    if mixed:
        runs = [(size // 4, size, size), (size // 4, size, size - 32)]
    k, v = (TransformLayout(case.heads, DIM, groups, *r, gain) for gain, r in enumerate(runs))
    return k, v


def random_code(layout: TransformLayout, device: str) -> Code:
    """A random rotation, with the steps that suit components of variance 1."""
    groups, n, rank = layout.groups, layout.heads // layout.groups * layout.dim, layout.rank
    basis = torch.linalg.qr(torch.randn(groups, n, n, device=device))[0][..., :rank]
    steps = torch.cat(
        [torch.full((count,), tailed_quantiser(bits)[0]) for bits, count in layout.runs]
    ).to(device)
    each = steps.expand(groups, rank).contiguous()
    metric = torch.eye(layout.dim, device=device).repeat(layout.heads, 1, 1)
    params = layout.params_of(
        torch.zeros(groups, n, device=device), basis / steps, basis.mT * steps[:, None],
        metric, each, each if layout.gain else None,
    )  # fmt: skip
    return Code(layout, tuple(params))


def side(layout: TransformLayout, case: Case) -> list[Tensor]:
    """One packed side, flat; its pool holds the first four tokens and four of the others."""
    codes, *gains = (width for width, _ in layout.payload_fields(DTYPE))
    shape = (case.batch, case.tokens)
    payload = [torch.randint(0, 256, (*shape, codes), dtype=torch.uint8, device="cuda")]
    payload += [torch.rand(*shape, width, device="cuda").add(0.5).half() for width in gains]
    pool, ring = (
        torch.randn(case.batch, case.heads, slots, DIM, device="cuda", dtype=DTYPE)
        for slots in (8, RING)
    )
    sinks = torch.arange(4, device="cuda").repeat(case.batch, 1)
    others = torch.randint(4, case.tokens, (case.batch, 4), device="cuda")
    positions = torch.cat([sinks, others], 1)
    return [*payload, pool, positions, ring, *random_code(layout, "cuda").params]


def packed_arguments(case: Case, mixed: bool) -> tuple[Any, ...]:
    """Arguments of ``attend_packed``."""
    k, v = layouts(case, mixed)
    q = torch.randn(case.batch, case.q_heads, 1, DIM, device="cuda", dtype=DTYPE)
    lengths = torch.tensor([case.tokens, LIVE], device="cuda")
    return q, None, side(k, case), side(v, case), lengths, DIM**-0.5, k.spec, v.spec


def milliseconds(calls: Sequence[Callable[[], Any]], in_turn: int = 8, replays: int = 15) -> float:
    """Median time of one call; ``calls`` take turns."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in itertools.islice(itertools.cycle(calls), in_turn):
            call()
    times = []
    for _ in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / in_turn)
    return sorted(times[2:])[replays // 2]


def copy_bandwidth() -> float:
    """Bytes read and written each second by a large copy, in GB/s."""
    source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds([lambda: target.copy_(source)], 4) / 1e6


def copies(case: Case) -> int:
    """How many copies of a case's caches take turns: they exceed the cache together."""
    dense = 4 * case.batch * case.heads * case.tokens * DIM
    return 1 if dense > 1 << 29 else 8


def dense_times(case: Case) -> dict[str, float]:
    """PyTorch's dense kernels, and what a growing cache does each step: cat, then the best."""
    sets = []
    for _ in range(copies(case)):
        q = torch.randn(case.batch, case.q_heads, 1, DIM, device="cuda", dtype=DTYPE)
        k, v = (
            torch.randn(case.batch, case.heads, case.tokens, DIM, device="cuda", dtype=DTYPE)
            for _ in range(2)
        )
        sets.append((q, k, v))
    gqa = case.q_heads != case.heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

    def grow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2))

    times = {}
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            try:
                times[name] = milliseconds([partial(attend, *s) for s in sets])
            except RuntimeError:  # not for this shape
                continue
    with sdpa_kernel(BACKENDS[min(times, key=lambda name: times[name])]):
        times["cat + best"] = milliseconds([partial(grow, *s) for s in sets])
    return times


def profiled(call: Callable[[], Any], repeats: int) -> list[Any]:
    """The profiler's sums over some calls, one for each kernel."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    return [event for event in trace.key_averages() if event.self_device_time_total]


def kernel_times(call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of each kernel of one call."""
    return {
        event.key: round(event.self_device_time_total / event.count, 1)
        for event in profiled(call, 10)
    }


def packed_times(
    case: Case, mixed: bool, bandwidth: float, config: Config | None = None
) -> dict[str, Any]:
    """Our three kernels: time of all, of each, and the bytes of codes over the time."""
    sets = [packed_arguments(case, mixed) for _ in range(copies(case))]
    calls = [partial(attend_packed, *s, config=config) for s in sets]  # type: ignore[misc]
    both = layouts(case, mixed)
    codes = case.batch * case.tokens * sum(layout.token_bytes(DTYPE) for layout in both)
    kernels = kernel_times(calls[0])
    rate = codes / kernels["attend_kernel"] / 1e3
    return {
        "ms": milliseconds(calls),
        "kernels_us": kernels,
        "code_bytes": codes,
        "floor_ms": codes / bandwidth / 1e6,
        "kernel_gb_s": round(rate),
        "kernel_share_of_copy": round(rate / bandwidth, 3),
    }


def predicted_ms(case: Case, mixed: bool, device: str) -> float | None:
    """What the cost model says; None: it does not know the device."""
    known = device_named(device)
    if known is None:
        return None
    policy = Policy(sinks=4, extra=4, window=RING - 32, block=32)
    k, v = (PackedSide(layout, policy, DTYPE) for layout in layouts(case, mixed))
    return 1e3 * seconds_of(k, v, case.q_heads, known, case.batch, case.tokens)


def compile_ahead(job: tuple[str, bool, Config | None]) -> None:
    """Compile the kernels of one case in a process of its own; Triton keeps them on disk.

    At its full size: Triton compiles anew for numbers of programs that 16 divides, or that are 1.
    """
    torch.set_num_threads(1)
    name, mixed, config = job
    case = (CASES | SWEEP)[name]
    attend_packed(*packed_arguments(case, mixed), config=config)  # type: ignore[misc]
    torch.cuda.synchronize()


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--sweep", action="store_true", help="more context lengths, for the plots")
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        cases = CASES | (SWEEP if args.sweep else {})
        todo = [(name, mixed, None) for name in cases for mixed in (False, True)]
        pool.map(compile_ahead, todo, chunksize=1)
    bandwidth = copy_bandwidth()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": " ".join(["python benchmarks/attend_gpu.py", *sys.argv[1:]]),
        "copy_gb_s": round(bandwidth),
        "cases": {},
    }
    print(f"{report['device']}: copy {bandwidth:.0f} GB/s")
    for name, case in cases.items():
        dense = dense_times(case)
        best = min(time for key, time in dense.items() if key in BACKENDS)
        row: dict[str, Any] = {"dense_ms": dense}
        for kind in ("8 bit", "mixed"):
            ours = row[kind] = packed_times(case, kind == "mixed", bandwidth)
            ours["speedup"] = round(best / ours["ms"], 2)
            ours["speedup_over_cat"] = round(dense["cat + best"] / ours["ms"], 2)
            predicted = predicted_ms(case, kind == "mixed", report["device"])
            said = ""
            if predicted is not None:
                ours["predicted_ms"] = predicted
                said = f", predicted {1e3 * predicted:6.1f} us"
            print(
                f"{name:16} {kind:6} {1e3 * ours['ms']:7.1f} us{said} (floor "
                f"{1e3 * ours['floor_ms']:6.1f}), dense {1e3 * best:7.1f}: {ours['speedup']:5.2f}x,"
                f" with cat {ours['speedup_over_cat']:5.2f}x; kernel"
                f" {100 * ours['kernel_share_of_copy']:3.0f}% of copy, {ours['kernels_us']}",
                flush=True,
            )
        report["cases"][name] = row
        torch.cuda.empty_cache()
    RESULTS.mkdir(exist_ok=True)
    short = str(report["device"]).replace("NVIDIA ", "").split()[0].lower()
    path = RESULTS / f"attend-{short}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
