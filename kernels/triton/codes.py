"""Codes from bytes to float16 numbers, inside Triton kernels.

A code u of b bits becomes u and a constant, which float16 holds exactly. Integer-to-float
conversions run at a quarter of the rate of other instructions and would bound the kernel, so bits
are put into the mantissa of a float16 whose last place is worth 1 (1024 + u), and a subtraction
takes 1024 away again. After Kim et al., "Who Says Elephants Can't Run" (2022), 4. Codes of 8 bits
keep their 1024: it is the same for all components, so it is taken from the sums at the end.

Bytes are read two at a time, as words of 16 bits. A matrix product then finds them in registers as
it wants its float16 operands, whether it runs over components (keys) or over tokens (values), and
each instruction here turns two words at once. Of the ``16 / b`` codes in word w of a run of B
bytes, code c is component ``(c % P) B + 2 w + c // P`` with ``P = 8 / b`` (``codec/bits.py``).
The kernels put components in the order of their codes: code c of word w is number ``c B / 2 + w``.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Two words in $1 become two float16 in $0. `prmt` puts a byte of each below an exponent;
# `lop3` (a & b | c) keeps the bits of one code and sets the exponent. A code that lies p bits up
# counts 2^p times too much, which the multiplication undoes.
_BYTE = "{{ prmt.b32 $0, $1, 0x64646464, {}; }}"
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
# The same for a code that is $2 bits up in its word. ($3 is the second word's $2, and no other.)
_SHIFTED = (
    "{{ .reg .b32 x, s; mov.b32 s, 0x{s}{s}; shr.b32 x, $1, $2;"
    " lop3.b32 x, x, 0x{m}{m}, 0x64006400, 0xEA; sub.f16x2 $0, x, s; }}"
)


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
ASM_8_ANY = tl.constexpr(_SHIFTED.format(m="00ff", s="0000"))
ASM_4_ANY = tl.constexpr(_SHIFTED.format(m="000f", s="6408"))
ASM_2_ANY = tl.constexpr(_SHIFTED.format(m="0003", s="6402"))

OFFSET_8, OFFSET = tl.constexpr(1024 + 128 - 0.5), tl.constexpr(-0.5)
"""``u + 1/2 - 2^(b-1)``, the middle of a code's interval, is ``converted(u)`` less this.

The first for 8 bits, the second for fewer."""


@triton.jit
def _convert(words, TEXT: tl.constexpr):
    return tl.inline_asm_elementwise(TEXT, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def converted(words, BITS: tl.constexpr, CODE: tl.constexpr, ASM: tl.constexpr):
    """Code ``CODE`` of each word (uint16, any shape) of a run of ``BITS``-bit codes, in float16.

    8 bits: ``1024 + u``; else ``u - 2^(b-1)``. ASM: False where there is no assembler (Triton's
    interpreter).
    """
    if not ASM:
        mask: tl.constexpr = (1 << BITS) - 1
        add: tl.constexpr = 1024 if BITS == 8 else -(1 << (BITS - 1))
        return ((words >> (BITS * CODE)) & mask).to(tl.float16) + add
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
def converted_at(words, shift, BITS: tl.constexpr, ASM: tl.constexpr):
    """The code that lies ``shift`` bits up in each word: :func:`converted` with shifts at run time.

    shift: int32, of the shape of ``words``, the same for neighbours in pairs.
    """
    if not ASM:
        mask: tl.constexpr = (1 << BITS) - 1
        add: tl.constexpr = 1024 if BITS == 8 else -(1 << (BITS - 1))
        return ((words.to(tl.int32) >> shift) & mask).to(tl.float16) + add
    elif BITS == 8:
        return _convert_at(words, shift, ASM_8_ANY)
    elif BITS == 4:
        return _convert_at(words, shift, ASM_4_ANY)
    else:
        return _convert_at(words, shift, ASM_2_ANY)


@triton.jit
def _convert_at(words, shift, TEXT: tl.constexpr):
    return tl.inline_asm_elementwise(
        TEXT, "=r,r,r,r", [words, shift], dtype=tl.float16, is_pure=True, pack=2
    )


@triton.jit
def component(
    number, B8: tl.constexpr, B4: tl.constexpr, B2: tl.constexpr,
):  # fmt: skip
    """The component that has this number in the order of codes; of a code with runs of B* bytes."""
    found = number
    if B8:
        found = tl.where(number < B8, _in_run(number, 0, B8, 1), found)
    if B4:
        in_run = (number >= B8) & (number < B8 + 2 * B4)
        found = tl.where(in_run, _in_run(number - B8, B8, B4, 2), found)
    if B2:
        start: tl.constexpr = B8 + 2 * B4
        found = tl.where(number >= start, _in_run(number - start, start, B2, 4), found)
    return found


@triton.jit
def _in_run(number, START: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr):
    code = number // (WIDTH // 2)
    return START + code % P * WIDTH + code // P + number % (WIDTH // 2) * 2


@triton.jit
def load_run(
    base, tokens, live, PITCH: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, ALL: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Bytes ``START .. START + WIDTH`` of tokens as words, ``[tokens, PAD / 2]``; 0 behind them.

    base: the first byte of token 0. PITCH: bytes from token to token. ALL: any of the tokens may
    be read, whether it is live or not: stale codes are numbers as good as any. ACROSS: transposed,
    ``[PAD / 2, tokens]``.
    """
    word = tl.arange(0, PAD // 2)
    first = (base + START).to(tl.pointer_type(tl.uint16))
    if ACROSS:
        where = first + tokens[None, :] * (PITCH // 2) + word[:, None]
        some, alive = (word < WIDTH // 2)[:, None], live[None, :]
    else:
        where = first + tokens[:, None] * (PITCH // 2) + word[None, :]
        some, alive = (word < WIDTH // 2)[None, :], live[:, None]
    if ALL and WIDTH == PAD:
        return tl.load(where)
    elif ALL:
        return tl.load(where, mask=some, other=0)
    elif WIDTH == PAD:
        return tl.load(where, mask=alive, other=0)
    else:
        return tl.load(where, mask=alive & some, other=0)
