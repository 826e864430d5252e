"""Codes from bytes to float16 numbers, inside Triton kernels.

A code u of b bits becomes u and a constant, which float16 holds exactly. Integer-to-float
conversions run at a quarter of the rate of other instructions and would bound the kernel, so bits
are put into the mantissa of a float16 whose exponent makes their last place worth 1: u lands on
top of a power of two, 2^10 where it takes the lowest bits of the mantissa, 2^6 four bits up, 2^2
eight bits up. After Kim et al., "Who Says Elephants Can't Run" (2022), 4. The power of two is the
same for all components of a width, so it is taken from the sums at the end, not from each number.

Bytes are read two at a time, as words of 16 bits. A matrix product then finds them in registers as
it wants its float16 operands, whether it runs over components (keys) or over tokens (values), and
each instruction here takes two words at once. Of the ``16 / b`` codes in word w of a run of B
bytes, code c is component ``(c % P) B + 2 w + c // P`` with ``P = 8 / b`` (``codec/bits.py``).
The kernels put components in the order of their codes: code c of word w is number ``c B / 2 + w``.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLACES = {8: 0, 4: 4, 2: 8}
"""Bits of the mantissa below the codes of each width."""
PLACE_8, PLACE_4, PLACE_2 = (tl.constexpr(place) for place in PLACES.values())

# Two words in $1 become two float16 in $0. `prmt` puts a byte of each below an exponent; else bits
# are brought to their place, and `lop3` (a & b | c) keeps those of one code and sets the exponent.
_BYTE = "{{ prmt.b32 $0, $1, 0x64646464, {}; }}"
_BITS = (
    "{{ .reg .b32 x; {shift} x, $1, {by};"
    " lop3.b32 $0, x, 0x{mask}{mask}, 0x{power}{power}, 0xEA; }}"
)
# The same where a rotation by $2 brings the code to its place. ($3 is the second word's $2, and no
# other. What a rotation brings over from the other word is not of this code.)
_ROTATED = (
    "{{ .reg .b32 x; shf.l.wrap.b32 x, $1, $1, $2;"
    " lop3.b32 $0, x, 0x{mask}{mask}, 0x{power}{power}, 0xEA; }}"
)


def _constants(bits: int) -> dict[str, str]:
    """Of a width: which bits are kept, and the power of two below them, as float16."""
    place = PLACES[bits]
    return {"mask": f"{((1 << bits) - 1) << place:04x}", "power": f"{(25 - place) << 10:04x}"}


def _text(bits: int, code: int) -> tl.constexpr:
    up = PLACES[bits] - bits * code
    shift = "shl.b32" if up > 0 else "shr.b32"
    return tl.constexpr(_BITS.format(shift=shift, by=abs(up), **_constants(bits)))


ASM_8_0 = tl.constexpr(_BYTE.format("0x4240"))
ASM_8_1 = tl.constexpr(_BYTE.format("0x4341"))
ASM_4_0, ASM_4_1, ASM_4_2, ASM_4_3 = _text(4, 0), _text(4, 1), _text(4, 2), _text(4, 3)
ASM_2_0, ASM_2_1, ASM_2_2, ASM_2_3 = _text(2, 0), _text(2, 1), _text(2, 2), _text(2, 3)
ASM_2_4, ASM_2_5, ASM_2_6, ASM_2_7 = _text(2, 4), _text(2, 5), _text(2, 6), _text(2, 7)
ASM_8_ANY = tl.constexpr(_ROTATED.format(**_constants(8)))
ASM_4_ANY = tl.constexpr(_ROTATED.format(**_constants(4)))
ASM_2_ANY = tl.constexpr(_ROTATED.format(**_constants(2)))

OFFSET_8, OFFSET_4, OFFSET_2 = (
    tl.constexpr(2.0 ** (10 - place) + 2 ** (bits - 1) - 0.5) for bits, place in PLACES.items()
)
"""``u + 1/2 - 2^(b-1)``, the middle of a code's interval, is ``converted(u)`` less this."""


@triton.jit
def offset(number, B8: tl.constexpr, B4: tl.constexpr):
    """What the component of this number in the order of codes has too much; of runs of B* bytes."""
    narrow = tl.where(number < B8 + 2 * B4, OFFSET_4, OFFSET_2)
    return tl.where(number < B8, OFFSET_8, narrow)


@triton.jit
def _convert(words, TEXT: tl.constexpr):
    return tl.inline_asm_elementwise(TEXT, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def converted(words, BITS: tl.constexpr, CODE: tl.constexpr, ASM: tl.constexpr):
    """Code ``CODE`` of each word (uint16, any shape) of a run of ``BITS``-bit codes, in float16.

    8 bits: ``1024 + u``; 4 bits: ``64 + u``; 2 bits: ``4 + u``. ASM: False where there is no
    assembler (Triton's interpreter).
    """
    if not ASM:
        return _plainly(words >> (BITS * CODE), BITS)
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
def rotation_of(code, BITS: tl.constexpr):
    """How far to the left a rotation brings code ``code`` (a tensor) of a word to its place."""
    place: tl.constexpr = PLACE_8 if BITS == 8 else PLACE_4 if BITS == 4 else PLACE_2
    return code * -BITS + place


@triton.jit
def converted_at(words, rotation, BITS: tl.constexpr, ASM: tl.constexpr):
    """:func:`converted` of the code that a rotation by so many bits brings to its place.

    rotation: of :func:`rotation_of`, of the shape of ``words``, the same for neighbours in pairs.
    """
    if not ASM:
        return _plainly(words.to(tl.int32) >> (rotation_of(0, BITS) - rotation), BITS)
    elif BITS == 8:
        return _convert_at(words, rotation, ASM_8_ANY)
    elif BITS == 4:
        return _convert_at(words, rotation, ASM_4_ANY)
    else:
        return _convert_at(words, rotation, ASM_2_ANY)


@triton.jit
def _plainly(words, BITS: tl.constexpr):
    """The code in the lowest bits."""
    power: tl.constexpr = 1024 if BITS == 8 else 64 if BITS == 4 else 4
    return (words & ((1 << BITS) - 1)).to(tl.float16) + power


@triton.jit
def _convert_at(words, rotation, TEXT: tl.constexpr):
    return tl.inline_asm_elementwise(
        TEXT, "=r,r,r,r", [words, rotation], dtype=tl.float16, is_pure=True, pack=2
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
    PAD: tl.constexpr, ALL: tl.constexpr, ACROSS: tl.constexpr, STACK: tl.constexpr = 1,
):  # fmt: skip
    """Bytes ``START .. START + WIDTH`` of tokens as words, ``[tokens, PAD / 2]``; 0 behind them.

    base: the first byte of token 0. PITCH: bytes from token to token. ALL: any of the tokens may
    be read, whether it is live or not: stale codes are numbers as good as any. ACROSS: transposed,
    ``[STACK * PAD / 2, tokens]``, the words STACK times.
    """
    word = tl.arange(0, STACK * PAD // 2) % (PAD // 2)
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
