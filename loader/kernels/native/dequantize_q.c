/*
 * The types with one scale for a block, the ternary ones among them.
 *
 * Every function takes packed blocks, a block's number of weights for each, and the number of blocks.
 */
#include "dequantize.h"

/* 18 bytes, 128 weights: d[2] qs[16]; x = d where bit i of qs is set, else -d */
INLINE void unpack_q1_0(const uint8_t *restrict block, void *restrict out, enum format format) {
    const Floats minus_d = floats(-scale_at(block));
    UNROLLED
    for (int i = 0; i < 8; i++) {
        put(out, 16 * i, with_signs(minus_d, half_word_at(block + 2 + 2 * i)), format);
    }
}
DEQUANTIZERS(q1_0, 18, 128)

/* eight bytes, each a field of 2 bits of the two bytes at an address, lowest first */
INLINE uint64_t spread_fields(const uint8_t *at) {
    uint64_t x = half_word_at(at);
    x = (x | x << 24) & 0x000000ff000000ff;
    x = (x | x << 12) & 0x000f000f000f000f;
    return (x | x << 6) & 0x0303030303030303;
}

/* 18 bytes, 64 weights: d[2] qs[16]; x = d (q - 1) */
INLINE void unpack_q2_0(const uint8_t *restrict block, void *restrict out, enum format format) {
    const float d = scale_at(block);
    UNROLLED
    for (int i = 0; i < 4; i++) {
        const uint8_t *qs = block + 2 + 4 * i;
        const Floats q = floats_of_halves(spread_fields(qs), spread_fields(qs + 2));
        put(out, 16 * i, times(plus(q, -1), d), format);
    }
}
DEQUANTIZERS(q2_0, 18, 64)

/* 18 bytes, 32 weights: d[2] qs[16]; x = d (q - 8) */
INLINE void unpack_q4_0(const uint8_t *restrict block, void *restrict out, enum format format) {
    const float d = scale_at(block);
    const Bytes qs = bytes_at(block + 2);
    put(out, 0, times(floats_of((SignedBytes)(qs & 15) - 8), d), format);
    put(out, 16, times(floats_of((SignedBytes)(qs >> 4) - 8), d), format);
}
DEQUANTIZERS(q4_0, 18, 32)

/* 20 bytes, 32 weights: d[2] m[2] qs[16]; x = d q + m */
INLINE void unpack_q4_1(const uint8_t *restrict block, void *restrict out, enum format format) {
    const float d = scale_at(block), m = scale_at(block + 2);
    const Bytes qs = bytes_at(block + 4);
    put(out, 0, plus(times(floats_of((SignedBytes)(qs & 15)), d), m), format);
    put(out, 16, plus(times(floats_of((SignedBytes)(qs >> 4)), d), m), format);
}
DEQUANTIZERS(q4_1, 20, 32)

/* 22 bytes, 32 weights: d[2] qh[4] qs[16]; x = d (q - 16) */
INLINE void unpack_q5_0(const uint8_t *restrict block, void *restrict out, enum format format) {
    const float d = scale_at(block);
    const uint32_t qh = word_at(block + 2);
    const Bytes qs = bytes_at(block + 6);
    put(out, 0, times(floats_of((SignedBytes)((qs & 15) | spread_bits(qh, 0) << 4) - 16), d), format);
    put(out, 16, times(floats_of((SignedBytes)(qs >> 4 | spread_bits(qh, 16) << 4) - 16), d), format);
}
DEQUANTIZERS(q5_0, 22, 32)

/* 24 bytes, 32 weights: d[2] m[2] qh[4] qs[16]; x = d q + m */
INLINE void unpack_q5_1(const uint8_t *restrict block, void *restrict out, enum format format) {
    const float d = scale_at(block), m = scale_at(block + 2);
    const uint32_t qh = word_at(block + 4);
    const Bytes qs = bytes_at(block + 8);
    put(out, 0, plus(times(floats_of((SignedBytes)((qs & 15) | spread_bits(qh, 0) << 4)), d), m), format);
    put(out, 16, plus(times(floats_of((SignedBytes)(qs >> 4 | spread_bits(qh, 16) << 4)), d), m), format);
}
DEQUANTIZERS(q5_1, 24, 32)

/* 34 bytes, 32 weights: d[2] qs[32]; x = d q */
INLINE void unpack_q8_0(const uint8_t *restrict block, void *restrict out, enum format format) {
    const float d = scale_at(block);
    put(out, 0, times(floats_of((SignedBytes)bytes_at(block + 2)), d), format);
    put(out, 16, times(floats_of((SignedBytes)bytes_at(block + 18)), d), format);
}
DEQUANTIZERS(q8_0, 34, 32)

/* of fractions b / 256, the first digit in base 3, less 1 */
INLINE SignedBytes ternary(Bytes b) {
    const SignedBytes moved = (SignedBytes)(b ^ 128);
    return -1 - (SignedBytes)(moved >= 86 - 128) - (SignedBytes)(moved >= 171 - 128);
}

/* 54 bytes, 256 weights: qs[48] qh[4] d[2]; x = d (t - 1), t digit n of b / 256 in base 3: the first of b 3^n / 256 */
INLINE void unpack_tq1_0(const uint8_t *restrict block, void *restrict out, enum format format) {
    const float d = scale_at(block + 52);
    Bytes first = bytes_at(block), second = bytes_at(block + 16), third = bytes_at(block + 32);
    UNROLLED
    for (int n = 0; n < 5; n++) {
        put(out, 32 * n, times(floats_of(ternary(first)), d), format);
        put(out, 32 * n + 16, times(floats_of(ternary(second)), d), format);
        put(out, 160 + 16 * n, times(floats_of(ternary(third)), d), format);
        first += first + first;
        second += second + second;
        third += third + third;
    }
    const Bytes powers = {1, 1, 1, 1, 3, 3, 3, 3, 9, 9, 9, 9, 27, 27, 27, 27};
    const Halves last = (Halves){0} + (uint64_t)0x100000001 * word_at(block + 48);
    put(out, 240, times(floats_of(ternary((Bytes)last * powers)), d), format);
}
DEQUANTIZERS(tq1_0, 54, 256)

/* 66 bytes, 256 weights: qs[64] d[2]; x = d (q - 1) */
INLINE void unpack_tq2_0(const uint8_t *restrict block, void *restrict out, enum format format) {
    const float d = scale_at(block + 64);
    UNROLLED
    for (int i = 0; i < 16; i++) {
        const Bytes qs = bytes_at(block + 32 * (i / 8) + 16 * (i % 2));
        put(out, 16 * i, times(floats_of((SignedBytes)(qs >> 2 * (i / 2 % 4) & 3) - 1), d), format);
    }
}
DEQUANTIZERS(tq2_0, 66, 256)
