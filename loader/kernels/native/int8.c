/*
 * Rows of numbers as rotated int8: groups of 256 times ConvRot's Hadamard matrix, H4 x H4 x H4 x H4 / 16, each row in
 * steps of a scale of its own. The sums of `rotated` in int8.py, in its order.
 */
#include "transpose.h"

enum { GROUP = 256 };

#define FOUR(a, b, c, d, type)                                                                                         \
    do {                                                                                                               \
        const type p = a + b, m = a - b, q = c + d, n = c - d;                                                         \
        a = p + n, b = p - n, c = m + q, d = q - m;                                                                    \
    } while (0)

/*
 * Half of the rotation: 16 x 16 numbers are transposed, so that neighbours are 16 apart and many are computed at a time,
 * and then the sums of four that are 16 and 64 apart are taken.
 */
#if defined(SHUFFLED)
static inline void rotate_half(const float *in, float *out) {
    for (int i = 0; i < 16; i += 8) {
        floats x[16];
        transposed_8(in + 16 * i, 64, x);
        transposed_8(in + 16 * i + 8, 64, x + 8);
        UNROLLED
        for (int k = 0; k < 16; k += 4) {
            FOUR(x[k], x[k + 1], x[k + 2], x[k + 3], floats);
        }
        UNROLLED
        for (int k = 0; k < 4; k++) {
            FOUR(x[k], x[k + 4], x[k + 8], x[k + 12], floats);
        }
        UNROLLED
        for (int k = 0; k < 16; k++) {
            memcpy(out + 16 * k + i, &x[k], sizeof x[k]);
        }
    }
}
#else
static inline void rotate_half(const float *in, float *out) {
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 16; j++) {
            out[16 * j + i] = in[16 * i + j];
        }
    }
    for (int k = 0; k < 4; k++) {
        for (int i = 0; i < 16; i++) {
            float *x = out + 64 * k + i;
            FOUR(x[0], x[16], x[32], x[48], float);
        }
    }
    for (int i = 0; i < 64; i++) {
        float *x = out + i;
        FOUR(x[0], x[64], x[128], x[192], float);
    }
}
#endif

/* 16 times the rotated numbers, which may be written where they are: the rest is left to the scales */
static inline void rotate(const float *in, const float *smoothing, float *out) {
    float smoothed[GROUP], x[GROUP];
    if (smoothing) {
        for (int i = 0; i < GROUP; i++) {
            smoothed[i] = in[i] * smoothing[i];
        }
        in = smoothed;
    }
    rotate_half(in, x);
    rotate_half(x, out);
}

/* the size of the largest of 256, as bits, whose order is that of sizes, with NaN the largest */
static inline uint32_t largest(const float *x) {
    uint32_t most[16] = {0};
    for (int i = 0; i < GROUP; i += 16) {
        for (int j = 0; j < 16; j++) {
            const uint32_t size = bits_of_float(x[i + j]) & 0x7fffffff;
            most[j] = size > most[j] ? size : most[j];
        }
    }
    for (int j = 1; j < 16; j++) {
        most[0] = most[j] > most[0] ? most[j] : most[0];
    }
    return most[0];
}

/* in steps, rounded to nearest, ties to even, and no more than 127 of them */
static inline void round_to_steps(const float *restrict x, float inverse, int8_t *restrict out) {
    for (int i = 0; i < GROUP; i++) {
        /* the last bit of the constant is worth 1: the sum is rounded to it */
        int32_t steps = (int32_t)(bits_of_float(x[i] * inverse + 0x1.8p23f) - 0x4b400000);
        steps = steps < -127 ? -127 : steps;
        steps = steps > 127 ? 127 : steps;
        out[i] = (int8_t)steps;
    }
}

/*
 * Rows in int8, or their scales alone.
 *
 * rows         row_bytes each: packed, or float32
 * dequantizer  of packed rows, with its grid or NULL, and the number of their blocks; or NULL
 * smoothing    what the columns are multiplied by first, or NULL
 * scratch      memory for a row of float32
 * scales       of the rows: read if `given`, else written: the largest size of each, of 127 steps; NaN where there is one
 * out          (n, columns), or NULL
 * columns      a multiple of 256
 */
API void int8_rows(const uint8_t *rows, int64_t row_bytes, void *dequantizer, const int8_t *grid, int64_t blocks,
                   const float *smoothing, float *restrict scratch, float *restrict scales, int64_t given,
                   int8_t *restrict out, int64_t n, int64_t columns) {
    for (int64_t row = 0; row < n; row++, rows += row_bytes) {
        const float *values = dequantizer ? scratch : (const float *)rows;
        if (dequantizer) {
            dequantize_with(dequantizer, grid, rows, scratch, blocks);
        }
        uint32_t most = 0;
        for (int64_t column = 0; column < columns; column += GROUP) {
            rotate(values + column, smoothing ? smoothing + column : NULL, scratch + column);
            if (!given) {
                const uint32_t size = largest(scratch + column);
                most = size > most ? size : most;
            }
        }
        if (!given) {
            const float scale = float_of_bits(most) * 0.0625f / 127.0f;
            scales[row] = scale < 1e-30f ? 1e-30f : scale;
        }
        if (out) {
            const float inverse = 1.0f / scales[row] * 0.0625f;
            for (int64_t column = 0; column < columns; column += GROUP, out += GROUP) {
                round_to_steps(scratch + column, inverse, out);
            }
        }
    }
}
