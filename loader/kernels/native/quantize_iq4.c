/*
 * IQ4_NL and IQ4_XS as ggml packs them, with an importance matrix and without: the same bytes, many times as fast.
 *
 * Every function takes rows of float32, the moments of their columns or NULL, and the numbers of rows and of columns. A
 * weight is a scale times one of sixteen values, the nearest; 32 weights share a scale. ggml looks for each weight's
 * value with each of sixteen scales. Fifteen of these differ by a ninth at most, which is less than the values do: a
 * weight meets two neighbouring values at most, and one comparison tells which.
 *
 * Formulas and layouts: quantize_row_iq4_nl_impl and best_index_int8 in ggml's ggml-quants.c.
 */
#include "quantize.h"

enum { BLOCK = 256, BLOCKS = CHUNK / BLOCK, PARTS = BLOCK / 32, TRIES = 7 };

static const float VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* half way between the values: from there on the upper one is as near */
static inline float border(int i) { return (VALUES[i] + VALUES[i + 1]) * 0.5f; }

static inline floats plus_where(ints mask, floats value, float more) {
    return value + (floats)(mask & (ints)all(more));
}

/* the nearest value; the last one of NaN, as in ggml */
static inline floats nearest_value(floats x) {
    floats value = all(VALUES[15]);
    for (int i = 0; i < 15; i++) {
        value = plus_where(x < border(i), value, VALUES[i] - VALUES[i + 1]);
    }
    return value;
}

/* The two values next to x, which is between them. */
static inline void neighbours(floats x, floats *lower, floats *upper) {
    *lower = all(VALUES[14]);
    *upper = all(VALUES[15]);
    for (int i = 1; i < 15; i++) {
        const ints below = x < VALUES[i];
        *lower = plus_where(below, *lower, VALUES[i - 1] - VALUES[i]);
        *upper = plus_where(below, *upper, VALUES[i] - VALUES[i + 1]);
    }
}

static inline void search(const floats *x, const floats *importance, float *scales) {
    floats size = all(0.0f), outermost = all(0.0f), lower[32], upper[32], between[32];
    for (int i = 0; i < 32; i++) {
        const ints greater = size_of(x[i]) > size;
        size = chosen(greater, size_of(x[i]), size);
        outermost = chosen(greater, x[i], outermost);
    }
    const floats inverse = 1.0f / (-outermost / VALUES[0]), middle = VALUES[0] / outermost;
    floats sum_xq = all(0.0f), sum_qq = all(0.0f);
    for (int i = 0; i < 32; i++) {
        const floats q = nearest_value(inverse * x[i]);
        sum_xq += importance[i] * q * x[i];
        sum_qq += importance[i] * q * q;
        neighbours(middle * x[i], lower + i, upper + i);
        between[i] = (lower[i] + upper[i]) * 0.5f;
    }
    floats scale = chosen(sum_qq > 0.0f, sum_xq / sum_qq, all(0.0f)), best = scale * sum_xq;
    for (int try = -TRIES; try <= TRIES; try++) {
        const floats other = ((float)try + VALUES[0]) / outermost;
        sum_xq = sum_qq = all(0.0f);
        for (int i = 0; i < 32; i++) {
            const floats q = chosen(other * x[i] < between[i], lower[i], upper[i]);
            const floats weighted = importance[i] * q;
            sum_xq += weighted * x[i];
            sum_qq += weighted * q;
        }
        const ints better = (sum_qq > 0.0f) & (sum_xq * sum_xq > best * sum_qq);
        scale = chosen(better, sum_xq / sum_qq, scale);
        best = chosen(better, scale * sum_xq, best);
    }
    store(scales, chosen(size < 1e-15f, all(0.0f), scale));
}

/* The scales of the 16 times 32 weights of a chunk; the mean square is that of a block. */
static inline void search_chunk(const Chunk *chunk, int block, float *scales) {
    float means[CHUNK / 32], importance[CHUNK];
    if (chunk->moments) {
        mean_squares(chunk, block, 2.0f, means);
        weigh(chunk, block, means, importance);
    }
    for (int at = 0; at < CHUNK / 32; at += LANES) {
        floats x[32], w[32];
        load(chunk->x + 32 * at, 32, x);
        if (chunk->moments) {
            load(importance + 32 * at, 32, w);
        } else {
            for (int i = 0; i < 32; i++) {
                w[i] = x[i] * x[i];
            }
        }
        search(x, w, scales + at);
    }
}

/* The numbers of the values nearest to 32 weights, in 16 bytes. */
static inline void write_nearest(const float *x, float inverse, uint8_t *qs) {
    int32_t q[32];
    for (int i = 0; i < 32; i += LANES) {
        const floats scaled = inverse * loaded(x + i);
        ints number = (ints){0} + 15;
        for (int border_at = 0; border_at < 15; border_at++) {
            number += scaled < border(border_at);
        }
        store_ints(q + i, number);
    }
    for (int i = 0; i < 16; i++) {
        qs[i] = (uint8_t)(q[i] | q[i + 16] << 4);
    }
}

/* 18 bytes, 32 weights: d[2] qs[16]; x = d value[q] */
static void chunk_iq4_nl(const Chunk *chunk) {
    float scales[CHUNK / 32];
    search_chunk(chunk, 32, scales);
    uint8_t *out = chunk->out;
    for (int block = 0; block < chunk->blocks; block++, out += 18) {
        const float d = scales[block];
        write_half(out, d);
        write_nearest(chunk->x + 32 * block, d == 0.0f ? 0.0f : 1.0f / d, out + 2);
    }
}

/* 136 bytes, 256 weights: d[2] scales_h[2] scales_l[4] qs[128]; x = d (scale - 32) value[q] */
static void chunk_iq4_xs(const Chunk *chunk) {
    float scales[CHUNK / 32];
    search_chunk(chunk, BLOCK, scales);
    uint8_t *out = chunk->out;
    for (int block = 0; block < chunk->blocks; block++, out += 136) {
        const float *own = scales + PARTS * block;
        const float d = -outermost_of(own, PARTS) / 32.0f, inverse = d == 0.0f ? 0.0f : 1.0f / d;
        write_half(out, d);
        memset(out + 2, 0, 6);
        uint16_t high = 0;
        for (int part = 0; part < PARTS; part++) {
            const int packed = clamped_int(nearest_int(inverse * own[part]), -32, 31);
            const float *x = chunk->x + BLOCK * block + 32 * part;
            const float scale = d * (float)packed;
            write_nearest(x, scale == 0.0f ? 0.0f : 1.0f / scale, out + 8 + 16 * part);
            out[4 + part / 2] |= (uint8_t)(((packed + 32) & 15) << 4 * (part % 2));
            high |= (uint16_t)((packed + 32) >> 4 << 2 * part);
        }
        memcpy(out + 2, &high, 2);
    }
}

QUANTIZER(iq4_nl, 32, 18, false)
QUANTIZER(iq4_xs, BLOCK, 136, false)
