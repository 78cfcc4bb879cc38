/*
 * The types whose four bits stand for one of 16 values: IQ4 and the 4-bit floats.
 *
 * Every function takes packed blocks, a block's number of weights for each, and the number of blocks.
 */
#include "dequantize.h"

static const SignedBytes IQ4_VALUES = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const SignedBytes E2M1_VALUES = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* 16 bytes of indices: the low nibbles of 16 weights, then the high ones of the next 16 */
INLINE void put_values(void *out, int at, SignedBytes values, const uint8_t *qs, float scale, enum format format) {
    const Bytes index = bytes_at(qs);
    put(out, at, times(floats_of(look_up(values, index & 15)), scale), format);
    put(out, at + 16, times(floats_of(look_up(values, index >> 4)), scale), format);
}

/* 18 bytes, 32 weights: d[2] qs[16]; x = d value[q] */
INLINE void unpack_iq4_nl(const uint8_t *restrict block, void *restrict out, enum format format) {
    put_values(out, 0, IQ4_VALUES, block + 2, scale_at(block), format);
}
DEQUANTIZERS(iq4_nl, 18, 32)

/* 136 bytes, 256 weights: d[2] scales_h[2] scales_l[4] qs[128]; x = d (s - 32) value[q], groups of 32 */
INLINE void unpack_iq4_xs(const uint8_t *restrict block, void *restrict out, enum format format) {
    const float d = scale_at(block);
    const uint32_t scales_h = half_word_at(block + 2), scales_l = word_at(block + 4);
    UNROLLED
    for (int i = 0; i < 8; i++) {
        const uint32_t s = (scales_l >> 4 * i & 15) | (scales_h >> 2 * i & 3) << 4;
        put_values(out, 32 * i, IQ4_VALUES, block + 8 + 16 * i, d * (float)((int)s - 32), format);
    }
}
DEQUANTIZERS(iq4_xs, 136, 256)

/* 17 bytes, 32 weights: e[1] qs[16]; x = 2^(e - 128) value[q], the values doubled */
INLINE void unpack_mxfp4(const uint8_t *restrict block, void *restrict out, enum format format) {
    const uint32_t e = block[0], bits = e < 2 ? 0x200000u << e : (e - 1) << 23;
    format = format == BFLOAT16 && e < 2 ? ANY_BFLOAT16 : format;
    put_values(out, 0, E2M1_VALUES, block + 1, float_of_bits(bits), format);
}
DEQUANTIZERS(mxfp4, 17, 32)

/* 36 bytes, 64 weights: d[4] qs[32]; x = d / 2 value[q], d a float of 4 bits of exponent, 3 of mantissa; groups of 16 */
INLINE void unpack_nvfp4(const uint8_t *restrict block, void *restrict out, enum format format) {
    UNROLLED
    for (int i = 0; i < 4; i++) {
        const uint32_t d = block[i], exponent = d >> 3 & 15, is_normal = exponent != 0;
        const int mantissa = (int)((d & 7) | is_normal << 3) * (d != 127);
        const float scale = (float)mantissa * float_of_bits((exponent - is_normal + 117) << 23);
        const uint64_t qs = long_at(block + 4 + 8 * i);
        const Halves index = {qs & 0x0f0f0f0f0f0f0f0f, qs >> 4 & 0x0f0f0f0f0f0f0f0f};
        put(out, 16 * i, times(floats_of(look_up(E2M1_VALUES, (Bytes)index)), scale), format);
    }
}
DEQUANTIZERS(nvfp4, 36, 64)
