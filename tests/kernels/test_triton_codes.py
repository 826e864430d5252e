"""The assembler of the kernels, instruction by instruction, on every word there is."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from apack_compile.kernels.triton import codes

WORDS = np.arange(1 << 16, dtype=np.uint32)


def halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple((x >> shift & 0xFFFF).astype(np.uint16).view(np.float16) for shift in (0, 16))


def joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    bits = [half.astype(np.float16).view(np.uint16).astype(np.uint32) for half in (low, high)]
    return bits[0] | bits[1] << 16


def permute(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    """``prmt.b32``: byte i of the result is byte ``selector[i]`` of ``b, a``."""
    out = np.zeros_like(a)
    for i in range(4):
        pick = selector >> 4 * i & 7
        source = a if pick < 4 else b
        out = out | (source >> 8 * (pick % 4) & 0xFF) << 8 * i
    return out


def run(text: str, word: np.ndarray) -> np.ndarray:
    """Interpret the few instructions that ``codes.py`` uses."""
    values = {"$1": word}

    def value(name: str) -> np.ndarray:
        known = values.get(name)
        return np.full_like(word, int(name, 0)) if known is None else known

    for line in text.strip("{} ").split(";"):
        name, *rest = re.split(r"[ ,]+", line.strip())
        if not name or name == ".reg":
            continue
        target, *inputs = rest
        if name == "mov.b32":
            result = value(inputs[0])
        elif name == "shr.b32":
            result = value(inputs[0]) >> int(inputs[1])
        elif name == "prmt.b32":
            result = permute(value(inputs[0]), value(inputs[1]), int(inputs[2], 0))
        elif name == "lop3.b32":
            assert inputs[3] == "0xEA"  # a & b | c
            result = value(inputs[0]) & value(inputs[1]) | value(inputs[2])
        elif name == "sub.f16x2":
            pairs = zip(halves(value(inputs[0])), halves(value(inputs[1])), strict=True)
            result = joined(*(a - b for a, b in pairs))
        else:
            assert name == "fma.rn.f16x2"
            a, b, c = (halves(value(i)) for i in inputs)
            exact = [
                x.astype(np.float64) * y.astype(np.float64) + z
                for x, y, z in zip(a, b, c, strict=True)
            ]
            result = joined(*exact)
        values[target] = result
    return values["$0"]


@pytest.mark.parametrize(("bits", "code"), [(b, c) for b in (8, 4, 2) for c in range(16 // b)])
def test_words_become_centred_codes(bits: int, code: int) -> None:
    text = getattr(codes, f"ASM_{bits}_{code}").value
    others = np.roll(WORDS, 12345)  # the second word of the register
    low, high = halves(run(text, WORDS | others << 16))
    for out, words in ((low, WORDS), (high, others)):
        expected = (words >> bits * code & (1 << bits) - 1).astype(np.int64) - (1 << bits - 1)
        assert np.array_equal(out.astype(np.int64), expected)
        assert np.array_equal(out, out.astype(np.int64))
