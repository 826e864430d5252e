"""The kernels that encode against the plain functions: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

pytest.importorskip("triton", reason="Triton is not installed")

from apack_compile.cache import Policy, store
from apack_compile.codec import Code, CodeRef, Layout, TransformLayout
from apack_compile.codec.tiered import layout_of
from apack_compile.kernels.encode import encode, encode_tokens, tally
from apack_compile.kernels.pool import fill_pool
from apack_compile.kernels.triton import launch, launch_encode
from apack_compile.kernels.triton.calls import INTERPRETED
from apack_compile.ops import encode_cuda

from ..helpers import hand_code, pair_waves

DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

POLICY = Policy(sinks=3, extra=6, window=7, block=16, chunk=16)
NAN = float("nan")


def judging_code(layout: TransformLayout) -> Code:
    """A code whose sizes and errors are numbers of the size that fitted codes give."""
    code = hand_code(layout)
    waves = [pair_waves(layout)] if layout.positional else []
    mean, analysis, synthesis, units, *whiten, metric, scales, spans = code.params[
        : len(code.params) - len(waves)
    ]
    generator = torch.Generator().manual_seed(5)
    metric = (torch.randn(metric.shape, generator=generator) / layout.dim).half()
    scales = torch.rand(scales.shape, generator=generator) / 8
    units = units * torch.tensor([20 / analysis.shape[1] ** 0.5, 1.0])[:, None, None]
    spans = torch.stack([spans[0], 0.7 / spans[0]])
    return Code(layout, (mean, analysis, synthesis, units, *whiten, metric, scales, spans, *waves))


def on_device(tensors: list[Tensor]) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


def check(got: list[Tensor], wanted: list[Tensor], payloads: int) -> None:
    """Sums come in another order: a code may be its neighbour, a gain the next."""
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    for mine, theirs in zip(got[:payloads], wanted[:payloads], strict=True):
        assert (mine.cpu() == theirs.cpu()).double().mean() > 0.995
    pool, positions, *rest, counted = (t.cpu() for t in got[payloads:])
    pool_, positions_, *rest_, counted_ = (t.cpu() for t in wanted[payloads:])
    assert torch.equal(positions, positions_)
    torch.testing.assert_close(pool, pool_, rtol=0, atol=0, equal_nan=True)
    for mine, theirs in zip(rest, rest_, strict=True):  # the ring, which may hold a NaN
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(counted, counted_, rtol=2e-3, atol=1e-3)


LAYOUTS = [
    TransformLayout(2, 16, 1, 16, 0, 0, 0), TransformLayout(2, 40, 1, 8, 16, 24, 1),
    TransformLayout(4, 16, 2, 8, 16, 8, 2), TransformLayout(2, 64, 1, 0, 64, 32, 1),
]  # fmt: skip
REAL = [
    TransformLayout(4, 128, 1, 128, 0, 0, 0), TransformLayout(4, 128, 1, 32, 128, 96, 1),
    TransformLayout(32, 128, 8, 32, 128, 128, 0), TransformLayout(8, 128, 8, 128, 0, 0, 2),
    TransformLayout(2, 256, 1, 64, 128, 128, 1), TransformLayout(8, 80, 2, 32, 64, 32, 1),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS if INTERPRETED else LAYOUTS + REAL)
@pytest.mark.parametrize("seen", [False] if INTERPRETED else [False, True])
@pytest.mark.parametrize("length", [70] if INTERPRETED else [1, 5, 70, 2100])
def test_a_prefill(layout: TransformLayout, seen: bool, length: int) -> None:
    code = judging_code(layout)
    x = torch.randn(2, layout.heads, length, layout.dim).bfloat16()
    visible = None
    if seen:
        visible = torch.ones(2, length, dtype=torch.bool)
        visible[0, : min(length - 1, 9)] = False
    run(x, visible, code)


TURNED = [
    TransformLayout(2, 16, 1, 16, 0, 0, 0, rotary=16),
    TransformLayout(2, 40, 1, 8, 16, 24, 1, rotary=24, interleaved=1),
    TransformLayout(4, 16, 2, 8, 16, 8, 2, rotary=10),
]  # fmt: skip
TURNED_REAL = [
    TransformLayout(4, 128, 1, 32, 128, 128, 0, rotary=128),
    TransformLayout(8, 80, 2, 32, 64, 32, 1, rotary=32),
    TransformLayout(2, 256, 1, 64, 128, 128, 0, rotary=64, interleaved=1),
]


@pytest.mark.parametrize("layout", TURNED if INTERPRETED else TURNED + TURNED_REAL)
@pytest.mark.parametrize("length", [70] if INTERPRETED else [1, 5, 70, 2100])
def test_keys_are_turned_back(layout: TransformLayout, length: int) -> None:
    """To positions that count from the first visible token; a pair with a broken number as well."""
    x = torch.randn(2, layout.heads, length, layout.dim).bfloat16()
    x[1, 0, length // 2, 3] = NAN
    visible = torch.ones(2, length, dtype=torch.bool)
    visible[0, : min(length - 1, 9)] = False
    run(x, visible, judging_code(layout))
    run(x, None, judging_code(layout))


def test_keys_are_turned_back_from_far_positions() -> None:
    """Angles of up to 30,000 radians."""
    layout, start = TURNED[1], 30_000
    code = judging_code(layout)
    params = on_device(list(code.params))
    x = torch.randn(2, 2, 20, 40, device=DEVICE).bfloat16()
    payload = [
        torch.zeros(2, start + 20, width, dtype=dtype, device=DEVICE)
        for width, dtype in layout.payload_fields(x.dtype)
    ]
    pool = torch.zeros(2, 2, 9, 40, device=DEVICE).bfloat16()
    positions = torch.tensor([[0, 1, 2, *[-1] * 6], [17, 18, 19, *[-1] * 6]], device=DEVICE)
    parts, _ = encode_tokens(x, params, layout, positions.clone(), start)
    begin = torch.tensor([start], dtype=torch.int32, device=DEVICE)
    launch_encode.encode_more(x, params, layout, payload, pool, positions, begin)
    for mine, theirs in zip(payload, parts, strict=True):
        assert (mine[:, start:] == theirs).double().mean() > 0.995


@pytest.mark.parametrize("power", [-13, 13])
@pytest.mark.parametrize("layout", LAYOUTS[1:3], ids=lambda layout: layout.spec)
def test_tokens_of_another_scale_have_the_same_codes(layout: TransformLayout, power: int) -> None:
    """Tokens are brought into the range of float16, and cut off where they leave it."""
    code, scale = judging_code(layout), 2.0**power
    mean, analysis, synthesis, units, *rest, spans = code.params
    units = units * torch.tensor([1.0, scale])[:, None, None]
    spans = spans / torch.tensor([scale, 1.0])
    scaled = Code(layout, (mean * scale, analysis, synthesis, units, *rest, spans))
    x = torch.randn(2, layout.heads, 70, layout.dim).bfloat16()
    x[0, 0, 30, 5] = 1e6  # beyond the range, and far from any other
    one, other = run(x, None, code), run(x * scale, None, scaled)
    payloads = len(layout.payload_fields(x.dtype))
    for a, b in zip(one[:payloads], other[:payloads], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(one[-1], other[-1])


def run(x: Tensor, visible: Tensor | None, code: Code) -> list[Tensor]:
    p = POLICY
    settings = (p.sinks, p.extra, p.window, p.ring, p.chunk)
    x, params = x.to(DEVICE), on_device(list(code.params))
    visible = None if visible is None else visible.to(DEVICE)
    wanted = encode(x, visible, params, code.layout.spec, *settings)
    assert isinstance(code.layout, TransformLayout)
    got = launch_encode.encode_new(x, visible, params, code.layout, *settings)
    check(got, wanted, len(code.layout.payload_fields(x.dtype)))
    return got


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU: what it guards is not in the interpreter")
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("length", [2101, 4085, 4187])
@pytest.mark.parametrize("ranks", [(0, 16, 16), (0, 32, 48), (0, 0, 32), (0, 16, 0), (16, 48, 32)])
def test_a_long_prompt_as_linear_layers_lay_out_values(
    batch: int, length: int, ranks: tuple[int, int, int]
) -> None:
    """Bug: an illegal memory access, at 4,096 tokens of bfloat16 in tiles of 64."""
    layout = TransformLayout(3, 64, 1, *ranks, 1)
    x = torch.randn(batch, length, 3, 64).bfloat16().transpose(1, 2)
    visible = torch.ones(batch, length, dtype=torch.bool)
    visible[0, :300] = False
    run(x, visible, judging_code(layout))


def odd_tokens(layout: TransformLayout, broken: int) -> Tensor:
    """Far ones and broken ones; with 0 and 1 as values of the rest, errors are far below theirs."""
    x = torch.randn(2, layout.heads, 70, layout.dim)
    x[0, :, 20] *= 30
    x[0, :, 41] *= 50
    x[1, :, 60] *= 40
    for i in range(broken):
        x[1, i % layout.heads, 10 + 5 * i, i] = NAN if i % 2 else float("inf")
    return x.bfloat16()


@pytest.fixture(params=[1, 5], ids=["one chunk", "five chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks in which some 70 tokens are judged."""
    if request.param > 1:
        monkeypatch.setattr(launch_encode, "BLOCK", 16)
        monkeypatch.setattr(launch_encode, "CHUNK", 16)
    return request.param


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("broken", "seen"), [(0, True), (2, False), (7, False)])
def test_far_and_broken_tokens_take_slots_the_worst_first(broken: int, seen: bool) -> None:
    """More broken ones than slots make the row NaN."""
    layout = LAYOUTS[1]
    visible = torch.ones(2, 70, dtype=torch.bool)
    visible[0, :30] = visible[1, :4] = False
    got = run(odd_tokens(layout, broken), visible if seen else None, judging_code(layout))
    pool, positions = got[2].cpu(), got[3].cpu()
    assert pool[1].isnan().all(-1).all(0).any() == (broken > 6)
    assert (positions[0] == 41).any() and (positions[0] == 20).any() == (not seen)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("broken", [0, 7])
@pytest.mark.parametrize("layout", [LAYOUTS[2], TURNED[2]], ids=["as they are", "turned back"])
def test_more_tokens_are_coded_in_place(layout: TransformLayout, broken: int) -> None:
    code = judging_code(layout)
    params = on_device(list(code.params))
    x = odd_tokens(layout, broken)[:, :, :48].to(DEVICE).transpose(1, 2).contiguous()
    x = x.transpose(1, 2)  # not contiguous
    payload = [
        torch.zeros(2, 96, width, dtype=dtype, device=DEVICE)
        for width, dtype in layout.payload_fields(x.dtype)
    ]
    pool = torch.randn(2, 4, 9, 16, device=DEVICE).bfloat16()
    taken = [[0, 1, 35, 7, -1, -1, -1, -1, -1], [11, 1, 35, 7, -1, -1, -1, -1, -1]]
    positions = torch.tensor(taken, device=DEVICE)
    start = 33
    parts, judged = encode_tokens(x, params, layout, positions, start)
    assert judged is not None
    wanted = [p.clone() for p in payload]
    for whole, part in zip(wanted, parts, strict=True):
        whole[:, start : start + 48] = part
    wanted += fill_pool(pool, positions, x, start, None, judged[0])
    all_of_them = torch.ones(48, dtype=torch.bool, device=DEVICE)
    wanted.append(tally(judged, all_of_them, wanted[-1], start))
    begin = torch.tensor([start], dtype=torch.int32, device=DEVICE)
    counted = launch_encode.encode_more(x, params, layout, payload, pool, positions, begin)
    check([*payload, pool, positions, counted], wanted, 2)


@pytest.mark.parametrize("layout", [LAYOUTS[1], TURNED[1]], ids=["as they are", "turned back"])
def test_a_compiled_graph_calls_the_kernels(
    layout: TransformLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a store that codes more does."""

    def by_kernels(x: Tensor, layout: Layout) -> Any:
        return launch_encode if launch_encode.takes(x, layout) else None

    code = judging_code(layout)
    params = on_device(list(code.params))
    p = POLICY
    settings = (layout.spec, p.sinks, p.extra, p.window, p.ring, p.chunk)
    x = torch.randn(2, 2, 70, 40, device=DEVICE).bfloat16()
    wanted = encode(x * 2, None, params, *settings)
    monkeypatch.setattr(encode_cuda, "encode_kernels", by_kernels)
    monkeypatch.setattr(store, "encode_kernels", by_kernels)

    def fn(x: Tensor) -> list[Tensor]:
        return torch.ops.apack.encode(x * 2, None, params, *settings)

    got, (source,) = run_and_get_code(torch.compile(fn), x)
    assert "apack.encode_kernels" in source and "encode_region" not in source
    check(got, wanted, 2)
    packed = store.SideStore.from_encoded(list(got), CodeRef(code), POLICY, 70)
    new = torch.randn(2, 2, 40, 40, device=DEVICE).bfloat16()
    packed.extend(new)
    assert (packed.length, packed.coded) == (110, 103)
    dense = packed.dense(110)
    assert torch.equal(dense[:, :, 103:], new[:, :, -7:])
    plain = encode(torch.cat([x * 2, new], 2), None, params, *settings)
    for mine, theirs in zip(packed.side.payload, plain, strict=False):
        assert (mine[:, :103] == theirs[:, :103]).double().mean() > 0.995
    packed = store.SideStore.encode(x * 2, CodeRef(code), POLICY)  # not in a graph
    check([*packed.tensors(), packed.tally], wanted, 2)


def test_codes_in_planes_are_left_to_plain_operators() -> None:
    layout = layout_of((2, 40, 1), (16, 16, 16), True, (26, 16))
    x = torch.randn(2, 2, 70, 40, device=DEVICE).bfloat16()
    assert not launch_encode.takes(x, layout)
    assert not launch.takes(x, LAYOUTS[1].spec, layout.spec)
