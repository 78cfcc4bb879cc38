"""The formulas of ``quant_types`` as Triton device functions: pointers to packed blocks in, weights out.

Each type has a function ``(block, table) -> weights``, named as the type:

- ``block``: ``[N]`` pointers to uint8, the first byte of each block, at any alignment;
- ``table``: a pointer to int8: the type's grid or its 16 values; None where the formula needs none;
- ``weights``: float32, ``[N, …]``, the weights of each block in order, in whatever shape is at hand.

What the bytes mean stands in ``quant_types``. Bytes are loaded one by one as far as the language is concerned: the
compiler joins neighbours to loads as wide as the block's size aligns them.

**Exactness.** No product rounds, and only the last addition of Q4_1, Q5_1, Q2_K, Q4_K and Q5_K does (see
``quant_types``). So the compiler may contract it with a product to a fused multiply-add, and the bits are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..quant_types.iq4 import VALUES

_TWO_TO_127 = tl.constexpr(2.0**127)

# The two halves of IQ4's values, 8 bits each, from which a shift takes one.
_VALUES_LOW = tl.constexpr(int.from_bytes(bytes(value & 255 for value in VALUES[:8]), "little", signed=True))
_VALUES_HIGH = tl.constexpr(int.from_bytes(bytes(value & 255 for value in VALUES[8:]), "little", signed=True))


@triton.jit
def _byte(pointer):
    return tl.load(pointer).to(tl.int32)


@triton.jit
def _word(pointer):
    """16 bits at any alignment, as int32."""
    return _byte(pointer) | _byte(pointer + 1) << 8


@triton.jit
def _half_of(bits):
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _half(pointer):
    return _half_of(_word(pointer))


@triton.jit
def _bytes(pointer, COUNT: tl.constexpr):
    """``[N]`` pointers → ``[N, COUNT] int32``."""
    return _byte(pointer[:, None] + tl.arange(0, COUNT)[None, :])


@triton.jit
def _signed_bytes(pointer, COUNT: tl.constexpr):
    """``[N]`` pointers → ``[N, COUNT] int8``."""
    return tl.load(pointer[:, None] + tl.arange(0, COUNT)[None, :]).to(tl.int8, bitcast=True)


@triton.jit
def _words(pointer, COUNT: tl.constexpr):
    """``[N]`` pointers → ``[N, COUNT] int32``: 16-bit words."""
    return _word(pointer[:, None] + 2 * tl.arange(0, COUNT)[None, :])


@triton.jit
def _chunks(pointer, COUNT: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr):
    """``[N]`` pointers → ``[N, COUNT, LENGTH] int32``: chunks of bytes, ``STRIDE`` apart; 0 gives the same ones."""
    chunk = tl.arange(0, COUNT)[None, :, None]
    return _byte(pointer[:, None, None] + (STRIDE * chunk + tl.arange(0, LENGTH)[None, None, :]))


@triton.jit
def _in_turn(first, second):
    """Of each chunk first all of ``first``, then all of ``second``: twice ``[N, chunks, length]`` → ``[N, weights]``.

    A thread has both, which it took from the same byte.
    """
    both = tl.permute(tl.join(first, second), (0, 1, 3, 2))
    return tl.reshape(both, (first.shape[0], 2 * first.shape[1] * first.shape[2]))


@triton.jit
def _nibbles(pointer, CHUNKS: tl.constexpr, LENGTH: tl.constexpr):
    """Of each chunk of bytes the low halves, then the high ones: ``[N]`` pointers → ``[N, weights] int32``."""
    bytes = _chunks(pointer, CHUNKS, LENGTH, LENGTH)
    return _in_turn(bytes & 15, bytes >> 4)


@triton.jit
def _pairs(pointer, CHUNKS: tl.constexpr, LENGTH: tl.constexpr):
    """Of each chunk of bytes their lowest two bits, then the next two, …: ``[N]`` pointers → ``[N, weights] int32``."""
    bytes = _chunks(pointer, CHUNKS, LENGTH, LENGTH)
    return _in_turn_of_four(tl.join(bytes, bytes >> 4) & 3, tl.join(bytes >> 2, bytes >> 6) & 3)


@triton.jit
def _in_turn_of_four(even, odd):
    """`_in_turn` of four: ``even`` has the first and the third, ``[N, chunks, length, 2]``, ``odd`` the others."""
    four = tl.permute(tl.join(even, odd), (0, 1, 3, 4, 2))
    return tl.reshape(four, (even.shape[0], 4 * even.shape[1] * even.shape[2]))


@triton.jit
def _fields(pointer, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Bit fields, byte by byte, in each the lowest first: ``[N]`` pointers → ``[N, COUNT * 8 / WIDTH] int32``."""
    field = tl.arange(0, 8 // WIDTH)[None, None, :]
    fields = _bytes(pointer, COUNT)[:, :, None] >> WIDTH * field & ((1 << WIDTH) - 1)
    return tl.reshape(fields, (pointer.shape[0], COUNT * (8 // WIDTH)))


@triton.jit
def _less(q, OFFSET: tl.constexpr):
    """``q - OFFSET`` as float32, of integers from 0 to 2²³ - 1, which are the last bits of the float32 ``2²³ + q``.

    The same as a conversion, which is the slowest of instructions where ``q - OFFSET`` is below 0.
    """
    return (q | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)


@triton.jit
def _scaled(scale, q):
    """``[N, groups] float32`` × ``[N, weights]`` numbers → ``[N, groups, weights / groups] float32``."""
    LENGTH: tl.constexpr = q.shape[1] // scale.shape[1]
    return scale[:, :, None] * tl.reshape(q, (q.shape[0], scale.shape[1], LENGTH)).to(tl.float32)


@triton.jit
def q1_0(block, table):
    return _scaled(_half(block)[:, None], _less(2 * _fields(block + 2, 16, 1), 1))


@triton.jit
def q2_0(block, table):
    return _scaled(_half(block)[:, None], _less(_fields(block + 2, 16, 2), 1))


@triton.jit
def q4_0(block, table):
    return _scaled(_half(block)[:, None], _less(_nibbles(block + 2, 1, 16), 8))


@triton.jit
def q4_1(block, table):
    return _scaled(_half(block)[:, None], _nibbles(block + 4, 1, 16)) + _half(block + 2)[:, None, None]


@triton.jit
def _five_bits(qh, qs):
    bytes = _chunks(qs, 1, 16, 16)
    k = tl.arange(0, 16)[None, None, :]
    first, second = _word(qh)[:, None, None] >> k, _word(qh + 2)[:, None, None] >> k
    return _in_turn(bytes & 15 | (first & 1) << 4, bytes >> 4 | (second & 1) << 4)


@triton.jit
def q5_0(block, table):
    return _scaled(_half(block)[:, None], _less(_five_bits(block + 2, block + 6), 16))


@triton.jit
def q5_1(block, table):
    return _scaled(_half(block)[:, None], _five_bits(block + 4, block + 8)) + _half(block + 2)[:, None, None]


@triton.jit
def q8_0(block, table):
    return _scaled(_half(block)[:, None], _signed_bytes(block + 2, 32))


@triton.jit
def _scaled_minus_minimum(dm, s, m, q):
    """``(d s) q - dmin m``: ``dm`` points to both halves, ``s`` and ``m`` are ``[N, groups] int32``."""
    scale = _half(dm)[:, None] * s.to(tl.float32)
    minimum = _half(dm + 2)[:, None] * m.to(tl.float32)
    return _scaled(scale, q) - minimum[:, :, None]


@triton.jit
def q2_k(block, table):
    scales = _bytes(block, 16)
    return _scaled_minus_minimum(block + 80, scales & 15, scales >> 4, _pairs(block + 16, 2, 32))


@triton.jit
def q3_k(block, table):
    low = _chunks(block + 32, 2, 32, 32)
    high = _chunks(block, 2, 32, 0) >> 4 * tl.arange(0, 2)[None, :, None] << 2
    even = tl.join(low & 3 | high & 4, low >> 4 & 3 | high >> 2 & 4)
    odd = tl.join(low >> 2 & 3 | high >> 1 & 4, low >> 6 | high >> 3 & 4)
    q = _in_turn_of_four(even, odd)
    s = _nibbles(block + 96, 1, 8) | _pairs(block + 104, 1, 4) << 4
    return _scaled(_half(block + 108)[:, None] * (s - 32).to(tl.float32), _less(q, 4))


@triton.jit
def _six_bits(scales):
    """``[N]`` pointers to 12 bytes → ``s``, ``m``, both ``[N, 8] int32``."""
    group = tl.arange(0, 8)[None, :]
    first_s = scales[:, None] + group % 4
    first_m = _byte(first_s + 4)
    nibbles = _byte(first_s + 8)
    first_s = _byte(first_s)
    s = tl.where(group < 4, first_s & 63, nibbles & 15 | first_s >> 2 & 48)
    m = tl.where(group < 4, first_m & 63, nibbles >> 4 | first_m >> 2 & 48)
    return s, m


@triton.jit
def q4_k(block, table):
    s, m = _six_bits(block + 4)
    return _scaled_minus_minimum(block, s, m, _nibbles(block + 16, 4, 32))


@triton.jit
def q5_k(block, table):
    s, m = _six_bits(block + 4)
    low = _chunks(block + 48, 4, 32, 32)
    high = _chunks(block + 16, 4, 32, 0) >> 2 * tl.arange(0, 4)[None, :, None]
    q = _in_turn(low & 15 | (high & 1) << 4, low >> 4 | (high & 2) << 3)
    return _scaled_minus_minimum(block, s, m, q)


@triton.jit
def q6_k(block, table):
    first, second = _chunks(block, 2, 32, 64), _chunks(block + 32, 2, 32, 64)
    high = _chunks(block + 128, 2, 32, 32) << 4
    even = tl.join(first & 15 | high & 48, first >> 4 | high >> 4 & 48)
    odd = tl.join(second & 15 | high >> 2 & 48, second >> 4 | high >> 6 & 48)
    q = _in_turn_of_four(even, odd)
    scale = _half(block + 208)[:, None] * _signed_bytes(block + 192, 16).to(tl.float32)
    return _scaled(scale, _less(q, 32))


@triton.jit
def tq1_0(block, table):
    # Digits of the bytes 0–31, of 32–47 and of 48–51: five, five and four of each; four weights have the same place.
    four = tl.arange(0, 64)
    long = four < 40
    short = four < 60
    first = tl.where(long, four % 8 * 4, tl.where(short, 32 + four % 4 * 4, 48))
    digit = tl.where(long, four // 8, tl.where(short, (four - 40) // 4, four - 60))
    power = tl.where(digit == 4, 81, 0x1B090301 >> 8 * (digit % 4) & 255)
    bytes = _byte(block[:, None, None] + (first[None, :, None] + tl.arange(0, 4)[None, None, :]))
    t = 3 * (bytes * power[None, :, None] & 255) >> 8
    return _scaled(_half(block + 52)[:, None], _less(tl.reshape(t, (block.shape[0], 256)), 1))


@triton.jit
def tq2_0(block, table):
    return _scaled(_half(block + 64)[:, None], _less(_pairs(block, 2, 32), 1))


@triton.jit
def _e2m1(q):
    """4-bit floats, doubled, as float32; -0 is 0.

    Their exponent and mantissa are those of a float32 that is 2¹²⁶ times as small, subnormal ones too.
    """
    bits = (q & 7) << 22 | (q & 8) << 28
    return bits.to(tl.float32, bitcast=True) * _TWO_TO_127 + 0.0


@triton.jit
def mxfp4(block, table):
    e = _byte(block)
    half_e8m0 = tl.where(e < 2, 0x200000 << e, (e - 1) << 23).to(tl.float32, bitcast=True)
    return _scaled(half_e8m0[:, None], _e2m1(_nibbles(block + 1, 1, 16)))


@triton.jit
def nvfp4(block, table):
    d = _bytes(block, 4)
    exponent = d >> 3 & 15
    mantissa = (d & 7) + tl.where(exponent > 0, 8, 0)
    power = (tl.maximum(exponent, 1) + (127 - 11) << 23).to(tl.float32, bitcast=True)
    half_ue4m3 = tl.where(d == 0x7F, 0, mantissa).to(tl.float32) * power
    return _scaled(half_ue4m3, _e2m1(_nibbles(block + 4, 4, 8)))


@triton.jit
def _iq4(q):
    """The values that 4-bit indices stand for, as int8."""
    return (tl.where(q < 8, _VALUES_LOW, _VALUES_HIGH) >> (8 * (q & 7)).to(tl.int64)).to(tl.int8)


@triton.jit
def iq4_nl(block, table):
    return _scaled(_half(block)[:, None], _iq4(_nibbles(block + 2, 1, 16)))


@triton.jit
def iq4_xs(block, table):
    s = _fields(block + 4, 4, 4) | _fields(block + 2, 2, 2) << 4
    scale = _half(block)[:, None] * (s - 32).to(tl.float32)
    return _scaled(scale, _iq4(_nibbles(block + 8, 8, 16)))


@triton.jit
def _entries(table, index, LENGTH: tl.constexpr):
    """A grid's entries, ``LENGTH`` values each: ``[N, runs] int32`` → ``[N, 256] int32``."""
    values = tl.load(table + (index[:, :, None] * LENGTH + tl.arange(0, LENGTH)[None, None, :]))
    return tl.reshape(values, (index.shape[0], 256)).to(tl.int32)


@triton.jit
def _signed(magnitudes, signs):
    """``[N, 256] int32``, negative where a bit of ``signs``, ``[N, 32] int32``, is set; lowest bits first."""
    negative = tl.reshape(signs[:, :, None] >> tl.arange(0, 8)[None, None, :] & 1, (signs.shape[0], 256))
    return tl.where(negative != 0, -magnitudes, magnitudes)


@triton.jit
def _even(signs):
    """Seven signs, and an eighth such that an even number of the eight bits is set."""
    parity = signs ^ signs >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return signs | (parity & 1) << 7


@triton.jit
def _signs_and_scale(pointer, STRIDE: tl.constexpr):
    """Eight 32-bit words, ``STRIDE`` bytes apart: four times 7 bits of signs, and 4 bits of a scale.

    ``[N]`` pointers → signs, ``[N, 32] int32`` of 8 bits, and the scale, ``[N, 8] int32``.
    """
    first = pointer[:, None] + STRIDE * tl.arange(0, 8)[None, :]
    word = _word(first) | _word(first + 2) << 16
    signs = word[:, :, None] >> 7 * tl.arange(0, 4)[None, None, :] & 127
    return _even(tl.reshape(signs, (pointer.shape[0], 32))), word >> 28 & 15


@triton.jit
def iq2_xxs(block, table):
    run = tl.arange(0, 32)[None, :]
    index = _byte(block[:, None] + (2 + 8 * (run // 4) + run % 4))
    signs, s = _signs_and_scale(block + 6, 8)
    scale = _half(block)[:, None] * (s.to(tl.float32) + 0.5) * 0.25
    return _scaled(scale, _signed(_entries(table, index, 8), signs))


@triton.jit
def iq2_xs(block, table):
    word = _words(block + 2, 32)
    scale = _half(block)[:, None] * (_fields(block + 66, 8, 4).to(tl.float32) + 0.5) * 0.25
    return _scaled(scale, _signed(_entries(table, word & 511, 8), _even(word >> 9)))


@triton.jit
def iq2_s(block, table):
    index = _bytes(block + 2, 32) | _fields(block + 66, 8, 2) << 8
    scale = _half(block)[:, None] * (_fields(block + 74, 8, 4).to(tl.float32) + 0.5) * 0.25
    return _scaled(scale, _signed(_entries(table, index, 8), _bytes(block + 34, 32)))


@triton.jit
def iq3_xxs(block, table):
    signs, s = _signs_and_scale(block + 66, 4)
    scale = _half(block)[:, None] * (s.to(tl.float32) + 0.5) * 0.5
    return _scaled(scale, _signed(_entries(table, _bytes(block + 2, 64), 4), signs))


@triton.jit
def iq3_s(block, table):
    index = _bytes(block + 2, 64) | _fields(block + 66, 8, 1) << 8
    scale = _half(block)[:, None] * (2 * _fields(block + 106, 4, 4) + 1).to(tl.float32)
    return _scaled(scale, _signed(_entries(table, index, 4), _bytes(block + 74, 32)))


@triton.jit
def _moved(entries, down):
    """``8 g + 1``, or ``8 g - 1`` where ``down``, ``[N, runs]``, is 1; ``[N, 256] int32``."""
    moved = 8 * tl.reshape(entries, (down.shape[0], down.shape[1], 256 // down.shape[1]))
    return tl.reshape(moved + 1 - 2 * down[:, :, None], (down.shape[0], 256))


@triton.jit
def iq1_s(block, table):
    group = _words(block + 34, 8)
    high = tl.reshape(group[:, :, None] >> 3 * tl.arange(0, 4)[None, None, :] & 7, (block.shape[0], 32))
    entries = _entries(table, _bytes(block + 2, 32) | high << 8, 8)
    scale = _half(block)[:, None] * (2 * (group >> 12 & 7) + 1).to(tl.float32) * 0.125
    return _scaled(scale, _moved(entries, group >> 15))


@triton.jit
def iq1_m(block, table):
    run = _fields(block + 32, 16, 4)
    entries = _entries(table, _bytes(block, 32) | (run & 7) << 8, 8)
    first = block + 48
    d = _word(first) >> 12 | _word(first + 2) >> 8 & 0xF0 | _word(first + 4) >> 4 & 0xF00 | _word(first + 6) & 0xF000
    s = tl.reshape(_words(first, 4)[:, :, None] >> 3 * tl.arange(0, 4)[None, None, :] & 7, (block.shape[0], 16))
    scale = _half_of(d)[:, None] * (2 * s + 1).to(tl.float32) * 0.125
    return _scaled(scale, _moved(entries, run >> 3))
