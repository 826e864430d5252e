"""Codes from bytes to centred float16 numbers, inside Triton kernels.

A code u of b bits becomes ``u - 2^(b-1)``, which float16 holds exactly. Integer-to-float
conversions run at a quarter of the rate of other instructions and would bound the kernel, so bits
are put into the mantissa of a float16 whose last place is worth 1 (1024 + u), and one fused
multiply-add takes 1024 away again. After Kim et al., "Who Says Elephants Can't Run" (2022), 4.

Bytes are read two at a time, as words of 16 bits. A matrix product then finds them in registers as
it wants its float16 operands, whether it runs over components (keys) or over tokens (values), and
each instruction here turns two words at once. Of the ``16 / b`` codes in word w of a run of B
bytes, code c is component ``(c % P) B + 2 w + c // P`` with ``P = 8 / b`` (``codec/bits.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Two words in $1 become two float16 in $0. `prmt` puts a byte of each below an exponent;
# `lop3` (a & b | c) keeps the bits of one code and sets the exponent. A code that lies p bits up
# counts 2^p times too much, which the multiplication undoes.
_BYTE = (
    "{{ .reg .b32 x, s; mov.b32 s, 0x64806480;"
    " prmt.b32 x, $1, 0x64646464, {}; sub.f16x2 $0, x, s; }}"
)
_BITS = (
    "{{ .reg .b32 x, f, s; mov.b32 f, 0x{f}{f}; mov.b32 s, 0x{s}{s}; {shift}"
    " lop3.b32 x, x, 0x{m}{m}, 0x64006400, 0xEA; fma.rn.f16x2 $0, x, f, s; }}"
)
# of a code: its bits; 2^-p; -(1024 / 2^p + 2^(b-1)), the last two as float16
_CODES = {
    (4, 0): ("000f", "3c00", "e408"),
    (4, 1): ("00f0", "2c00", "d480"),
    (2, 0): ("0003", "3c00", "e402"),
    (2, 1): ("000c", "3400", "dc08"),
    (2, 2): ("0030", "2c00", "d420"),
    (2, 3): ("00c0", "2400", "cc80"),
}


def _text(bits: int, code: int) -> tl.constexpr:
    per_byte = 8 // bits
    shift = "shr.b32 x, $1, 8;" if code >= per_byte else "mov.b32 x, $1;"
    m, f, s = _CODES[bits, code % per_byte]
    return tl.constexpr(_BITS.format(m=m, f=f, s=s, shift=shift))


ASM_8_0 = tl.constexpr(_BYTE.format("0x4240"))
ASM_8_1 = tl.constexpr(_BYTE.format("0x4341"))
ASM_4_0, ASM_4_1, ASM_4_2, ASM_4_3 = _text(4, 0), _text(4, 1), _text(4, 2), _text(4, 3)
ASM_2_0, ASM_2_1, ASM_2_2, ASM_2_3 = _text(2, 0), _text(2, 1), _text(2, 2), _text(2, 3)
ASM_2_4, ASM_2_5, ASM_2_6, ASM_2_7 = _text(2, 4), _text(2, 5), _text(2, 6), _text(2, 7)


@triton.jit
def _convert(words, TEXT: tl.constexpr):
    return tl.inline_asm_elementwise(TEXT, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def centred(words, BITS: tl.constexpr, CODE: tl.constexpr, ASM: tl.constexpr):
    """Code ``CODE`` of each word (uint16, any shape) of a run of ``BITS``-bit codes, in float16.

    ASM: False where there is no assembler (Triton's interpreter).
    """
    if not ASM:
        half: tl.constexpr = 1 << (BITS - 1)
        mask: tl.constexpr = (1 << BITS) - 1
        return ((words >> (BITS * CODE)) & mask).to(tl.float16) - half
    elif BITS == 8:
        if CODE == 0:
            return _convert(words, ASM_8_0)
        else:
            return _convert(words, ASM_8_1)
    elif BITS == 4:
        if CODE == 0:
            return _convert(words, ASM_4_0)
        elif CODE == 1:
            return _convert(words, ASM_4_1)
        elif CODE == 2:
            return _convert(words, ASM_4_2)
        else:
            return _convert(words, ASM_4_3)
    elif CODE == 0:
        return _convert(words, ASM_2_0)
    elif CODE == 1:
        return _convert(words, ASM_2_1)
    elif CODE == 2:
        return _convert(words, ASM_2_2)
    elif CODE == 3:
        return _convert(words, ASM_2_3)
    elif CODE == 4:
        return _convert(words, ASM_2_4)
    elif CODE == 5:
        return _convert(words, ASM_2_5)
    elif CODE == 6:
        return _convert(words, ASM_2_6)
    else:
        return _convert(words, ASM_2_7)


@triton.jit
def components(
    BITS: tl.constexpr, CODE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr,
):  # fmt: skip
    """The component that code ``CODE`` of each word stands for: ``[PAD / 2]``.

    START: the run's first component. WIDTH: its bytes. PAD: those of the tile.
    """
    P: tl.constexpr = 8 // BITS
    return START + CODE % P * WIDTH + CODE // P + 2 * tl.arange(0, PAD // 2)


@triton.jit
def load_run(
    base, tokens, live, PITCH: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Bytes ``START .. START + WIDTH`` of tokens as words, ``[tokens, PAD / 2]``; 0 behind them.

    base: the first byte of token 0. PITCH: bytes from token to token. ALL: any of the tokens may
    be read, whether it is live or not: stale codes are numbers as good as any.
    """
    word = tl.arange(0, PAD // 2)
    first = (base + START).to(tl.pointer_type(tl.uint16))
    where = first + tokens[:, None] * (PITCH // 2) + word[None, :]
    if ALL and WIDTH == PAD:
        return tl.load(where)
    elif ALL:
        return tl.load(where, mask=(word < WIDTH // 2)[None, :], other=0)
    elif WIDTH == PAD:
        return tl.load(where, mask=live[:, None], other=0)
    else:
        return tl.load(where, mask=live[:, None] & (word < WIDTH // 2)[None, :], other=0)
