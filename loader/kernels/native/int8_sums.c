/*
 * Sums of products of int8 as what they stand for: each is worth the scale of its token times that of its weight's row.
 *
 * Every function takes the sums of (tokens, rows), what is written, the scales of the tokens and of the rows, how many
 * tokens and rows there are, and how many numbers the tokens are apart in what is written.
 */
#include "dequantize.h" /* for `put`, which writes every format */

INLINE Floats scaled(const int32_t *sums, const float *scales, float token_scale) {
    float values[16];
    for (int i = 0; i < 16; i++) {
        values[i] = (float)sums[i] * (token_scale * scales[i]);
    }
    Floats x;
    memcpy(&x, values, sizeof x);
    return x;
}

INLINE void scale_all(const int32_t *restrict sums, uint8_t *restrict out, const float *restrict token_scales,
                      const float *restrict scales, int64_t tokens, int64_t rows, int64_t apart, enum format format) {
    const int64_t size = format == FLOAT32 ? 4 : 2, whole = rows / 16 * 16, rest = rows - whole;
    for (int64_t token = 0; token < tokens; token++, sums += rows, out += size * apart) {
        const float token_scale = token_scales[token];
        for (int64_t row = 0; row < whole; row += 16) {
            put(out + size * row, 0, scaled(sums + row, scales + row, token_scale), format);
        }
        if (rest) {
            int32_t last_sums[16] = {0};
            float last_scales[16] = {0}, last[16];
            memcpy(last_sums, sums + whole, 4 * (size_t)rest);
            memcpy(last_scales, scales + whole, 4 * (size_t)rest);
            put(last, 0, scaled(last_sums, last_scales, token_scale), format);
            memcpy(out + size * whole, last, (size_t)(size * rest));
        }
    }
}

#define SUMS(suffix, number, format)                                                                                   \
    API void int8_sums##suffix(const int32_t *restrict sums, number *restrict out, const float *restrict token_scales, \
                               const float *restrict scales, int64_t tokens, int64_t rows, int64_t apart) {            \
        scale_all(sums, (uint8_t *)out, token_scales, scales, tokens, rows, apart, format);                            \
    }
SUMS(, float, FLOAT32)
SUMS(_bf16, uint16_t, ANY_BFLOAT16)
SUMS(_f16, uint16_t, FLOAT16)
