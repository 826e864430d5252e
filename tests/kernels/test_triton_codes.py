"""The assembler of the kernels, instruction by instruction, on every word there is."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch
import triton
import triton.language as tl

from apack_compile.codec.bits import pack
from apack_compile.kernels.triton import codes
from apack_compile.kernels.triton.calls import INTERPRETED

WORDS = np.arange(1 << 16, dtype=np.uint32)


def halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple((x >> shift & 0xFFFF).astype(np.uint16).view(np.float16) for shift in (0, 16))


def permute(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    """``prmt.b32``: byte i of the result is byte ``selector[i]`` of ``b, a``."""
    out = np.zeros_like(a)
    for i in range(4):
        pick = selector >> 4 * i & 7
        source = a if pick < 4 else b
        out = out | (source >> 8 * (pick % 4) & 0xFF) << 8 * i
    return out


def run(text: str, word: np.ndarray, turn: int = 0) -> np.ndarray:
    """Interpret the few instructions that ``codes.py`` uses."""
    values = {"$1": word, "$2": np.full_like(word, turn & 0xFFFFFFFF)}

    def value(name: str) -> np.ndarray:
        known = values.get(name)
        return np.full_like(word, int(name, 0)) if known is None else known

    for line in text.strip("{} ").split(";"):
        name, *rest = re.split(r"[ ,]+", line.strip())
        if not name or name == ".reg":
            continue
        target, *inputs = rest
        if name == "shl.b32":
            result = value(inputs[0]) << value(inputs[1])
        elif name == "shr.b32":
            result = value(inputs[0]) >> value(inputs[1])
        elif name == "shf.l.wrap.b32":
            assert inputs[0] == inputs[1]  # a rotation
            by = value(inputs[2]) & 31
            result = value(inputs[0]) << by | value(inputs[0]) >> (32 - by & 31)
        elif name == "prmt.b32":
            result = permute(value(inputs[0]), value(inputs[1]), int(inputs[2], 0))
        else:
            assert name == "lop3.b32" and inputs[3] == "0xEA"  # a & b | c
            result = value(inputs[0]) & value(inputs[1]) | value(inputs[2])
        values[target] = result
    return values["$0"]


DEVICE = "cpu" if INTERPRETED else "cuda"


@triton.jit
def name_components(
    out, count, B8: tl.constexpr, B4: tl.constexpr, B2: tl.constexpr, SIZE: tl.constexpr
):
    i = tl.arange(0, SIZE)
    tl.store(out + i, codes.component(i, B8, B4, B2), mask=i < count)


CODES = [(bits, code) for bits in (8, 4, 2) for code in range(16 // bits)]


def check(bits: int, code: int, out: np.ndarray, words: np.ndarray) -> None:
    u = (words >> bits * code & (1 << bits) - 1).astype(np.float64)
    too_much = getattr(codes, f"OFFSET_{bits}").value
    assert np.array_equal(out - too_much, u + 0.5 - 2 ** (bits - 1))


@pytest.mark.parametrize(("bits", "code"), CODES)
@pytest.mark.parametrize("turned", [False, True])
def test_words_become_codes_and_a_constant(bits: int, code: int, turned: bool) -> None:
    text = getattr(codes, f"ASM_{bits}_ANY" if turned else f"ASM_{bits}_{code}").value
    others = np.roll(WORDS, 12345)  # the second word of the register
    turn = codes.PLACES[bits] - bits * code if turned else 0
    low, high = halves(run(text, WORDS | others << 16, turn))
    check(bits, code, low.astype(np.float64), WORDS)
    check(bits, code, high.astype(np.float64), others)


@triton.jit
def name_offsets(out, B8: tl.constexpr, B4: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, codes.offset(i, B8, B4))


@triton.jit
def name_rotations(out, BITS: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, codes.rotation_of(i, BITS))


@pytest.mark.parametrize(("b8", "b4"), [(0, 0), (16, 0), (0, 8), (16, 24)])
def test_each_width_has_its_offset(b8: int, b4: int) -> None:
    out = torch.empty(128, device=DEVICE)
    name_offsets[(1,)](out, b8, b4, 128)
    counts = b8, 2 * b4, 128 - b8 - 2 * b4
    each = [getattr(codes, f"OFFSET_{bits}").value for bits in (8, 4, 2)]
    assert out.tolist() == [o for o, count in zip(each, counts, strict=True) for _ in range(count)]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rotations_bring_codes_to_their_place(bits: int) -> None:
    """The interpreter takes them back, so that it would not see a wrong one."""
    out = torch.empty(16 // bits, dtype=torch.int32, device=DEVICE)
    name_rotations[(1,)](out, bits, 16 // bits)
    assert out.tolist() == [codes.PLACES[bits] - bits * code for code in range(16 // bits)]


@pytest.mark.parametrize("runs", [(32, 0, 0), (16, 32, 16), (48, 80, 48), (0, 32, 16), (16, 0, 16)])
def test_the_order_of_codes_is_that_of_packed_bytes(runs: tuple[int, int, int]) -> None:
    """Code c of word w, read off packed bytes, is the component that ``component`` names."""
    widths = (runs[0], runs[1] // 2, runs[2] // 4)
    values = [torch.randint(0, 1 << b, (n,)) for b, n in zip((8, 4, 2), runs, strict=True)]
    read = [
        pack(v, bits).view(torch.uint16).int() >> bits * code & (1 << bits) - 1
        for v, bits in zip(values, (8, 4, 2), strict=True)
        if len(v)
        for code in range(16 // bits)
    ]
    out = torch.empty(sum(runs), dtype=torch.int32, device=DEVICE)
    name_components[(1,)](out, len(out), *widths, 256)
    out = out.cpu()
    assert torch.equal(torch.cat(read), torch.cat(values)[out.long()].int())
