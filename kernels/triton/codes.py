"""Codes from bytes to centred float16 numbers, inside Triton kernels.

A code u of b bits becomes ``u - 2^(b-1)``, which float16 holds exactly. Integer-to-float
conversions run at a quarter of the rate of other instructions and would bound the kernel, so bits
are put into the mantissa of a float16 whose last place is worth 1 (1024 + u), and one fused
multiply-add takes 1024 away again. After Kim et al., "Who Says Elephants Can't Run" (2022), 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

# `lop3` (a & b | c) keeps the bits of a plane and sets the exponent; a code that lies p bits up
# counts 2^p times too much, which the multiplication undoes. `_FOUR` takes four bytes in a
# register, as keys come, and spreads them over halves; `_TWO` two halves that hold a byte each:
# bytes of values lie apart, because there a matrix product runs over tokens.
_FOUR = (
    "{{ .reg .b32 x, y, z, f, s; mov.b32 z, 0; mov.b32 f, 0x{f}{f}; mov.b32 s, 0x{s}{s};"
    " prmt.b32 x, $2, z, 0x4140; prmt.b32 y, $2, z, 0x4342;"
    " lop3.b32 x, x, 0x{m}{m}, 0x64006400, 0xEA; lop3.b32 y, y, 0x{m}{m}, 0x64006400, 0xEA;"
    " fma.rn.f16x2 $0, x, f, s; fma.rn.f16x2 $1, y, f, s; }}"
)
_TWO = (
    "{{ .reg .b32 x, f, s; mov.b32 f, 0x{f}{f}; mov.b32 s, 0x{s}{s};"
    " lop3.b32 x, $1, 0x{m}{m}, 0x64006400, 0xEA; fma.rn.f16x2 $0, x, f, s; }}"
)
# bits of the plane; 2^-p; -(1024 / 2^p + 2^(b-1)), the last two as float16
_PLANES = {
    (8, 0): ("00ff", "3c00", "e480"),
    (4, 0): ("000f", "3c00", "e408"),
    (4, 1): ("00f0", "2c00", "d480"),
    (2, 0): ("0003", "3c00", "e402"),
    (2, 1): ("000c", "3400", "dc08"),
    (2, 2): ("0030", "2c00", "d420"),
    (2, 3): ("00c0", "2400", "cc80"),
}


def _text(form: str, bits: int, plane: int) -> tl.constexpr:
    m, f, s = _PLANES[bits, plane]
    return tl.constexpr(form.format(m=m, f=f, s=s))


# All eight bits: bytes go between exponents at once.
FOUR_8 = tl.constexpr(
    "{ .reg .b32 x, y, s; mov.b32 s, 0x64806480;"
    " prmt.b32 x, $2, 0x64646464, 0x4140; prmt.b32 y, $2, 0x64646464, 0x4342;"
    " sub.f16x2 $0, x, s; sub.f16x2 $1, y, s; }"
)
FOUR_40, FOUR_41 = _text(_FOUR, 4, 0), _text(_FOUR, 4, 1)
FOUR_20, FOUR_21 = _text(_FOUR, 2, 0), _text(_FOUR, 2, 1)
FOUR_22, FOUR_23 = _text(_FOUR, 2, 2), _text(_FOUR, 2, 3)
TWO_8 = _text(_TWO, 8, 0)
TWO_40, TWO_41 = _text(_TWO, 4, 0), _text(_TWO, 4, 1)
TWO_20, TWO_21 = _text(_TWO, 2, 0), _text(_TWO, 2, 1)
TWO_22, TWO_23 = _text(_TWO, 2, 2), _text(_TWO, 2, 3)


@triton.jit
def _convert(codes, FOUR: tl.constexpr, TWO: tl.constexpr, APART: tl.constexpr):
    if APART:
        return tl.inline_asm_elementwise(
            TWO, "=r,r", [codes.to(tl.uint16)], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            FOUR, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )


@triton.jit
def centred(codes, BITS: tl.constexpr, PLANE: tl.constexpr, APART: tl.constexpr, ASM: tl.constexpr):
    """Plane ``PLANE`` of a run of ``BITS``-bit codes (uint8, any shape), in float16.

    APART: whether neighbours in memory go to different registers. ASM: False where there is no
    assembler (Triton's interpreter).
    """
    if not ASM:
        half: tl.constexpr = 1 << (BITS - 1)
        mask: tl.constexpr = (1 << BITS) - 1
        return ((codes >> (BITS * PLANE)) & mask).to(tl.float16) - half
    elif BITS == 8:
        return _convert(codes, FOUR_8, TWO_8, APART)
    elif BITS == 4:
        if PLANE == 0:
            return _convert(codes, FOUR_40, TWO_40, APART)
        else:
            return _convert(codes, FOUR_41, TWO_41, APART)
    elif PLANE == 0:
        return _convert(codes, FOUR_20, TWO_20, APART)
    elif PLANE == 1:
        return _convert(codes, FOUR_21, TWO_21, APART)
    elif PLANE == 2:
        return _convert(codes, FOUR_22, TWO_22, APART)
    else:
        return _convert(codes, FOUR_23, TWO_23, APART)


@triton.jit
def load_run(
    base, tokens, live, PITCH: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr,
):  # fmt: skip
    """Bytes ``START .. START + WIDTH`` of tokens, ``[tokens, PAD]``; 0 where there is nothing.

    base: the first byte of token 0. PITCH: bytes from token to token.
    """
    byte = tl.arange(0, PAD)
    where = base + tokens[:, None] * PITCH + START + byte[None, :]
    if WIDTH == PAD:
        return tl.load(where, mask=live[:, None], other=0)
    else:
        return tl.load(where, mask=live[:, None] & (byte < WIDTH)[None, :], other=0)
