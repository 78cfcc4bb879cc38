/*
 * Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 as ggml packs them, with an importance matrix and without: the same bytes, faster.
 *
 * Every function takes rows of float32, the moments of their columns or NULL, and the numbers of rows and of columns. A
 * block has 32 weights. Without moments its scale is that of its outermost weights; with them it is searched for.
 *
 * Formulas and layouts: quantize_row_q*_ref, without moments, and quantize_row_q*_impl, with them, in ggml's
 * ggml-quants.c.
 */
#include "quantize.h"

enum { BLOCK = 32, BLOCKS = CHUNK / BLOCK };

/* the first weight of a block of which this is the value, or the first zero: those have two signs */
static float first_equal(const float *x, float value) {
    int i = 0;
    while (x[i] != value) {
        i++;
    }
    return x[i];
}

/* the weight of the greatest size, the first of them */
static inline float outermost_weight(const float *x) {
    int32_t bits[BLOCK], size = 0;
    memcpy(bits, x, sizeof bits);
    for (int i = 0; i < BLOCK; i++) {
        const int32_t own = bits[i] & 0x7fffffff;
        size = own > size ? own : size;
    }
    for (int i = 0; i < BLOCK; i++) {
        if ((bits[i] & 0x7fffffff) == size) {
            return size ? x[i] : 0.0f;
        }
    }
    return 0.0f;
}

static inline void extremes(const float *x, float *low, float *high) {
    floats least = loaded(x), most = least;
    for (int i = LANES; i < BLOCK; i += LANES) {
        const floats next = loaded(x + i);
        least = chosen(next < least, next, least);
        most = chosen(next > most, next, most);
    }
    *low = least[0];
    *high = most[0];
    for (int lane = 1; lane < LANES; lane++) {
        *low = least[lane] < *low ? least[lane] : *low;
        *high = most[lane] > *high ? most[lane] : *high;
    }
    *low = *low == 0.0f ? first_equal(x, 0.0f) : *low;
    *high = *high == 0.0f ? first_equal(x, 0.0f) : *high;
}

/* q of (x - low) inverse, rounded down after `half` is added, in the eight bits that ggml takes it for */
static inline void round_down(const float *x, float low, float inverse, float half, int most, int32_t *q) {
    for (int i = 0; i < BLOCK; i++) {
        const int8_t rounded = (int8_t)(int32_t)((x[i] - low) * inverse + half);
        q[i] = rounded < most ? rounded : most;
    }
}

static inline void write_four_bits(uint8_t *qs, const int32_t *q) {
    for (int i = 0; i < 16; i++) {
        qs[i] = (uint8_t)((q[i] & 15) | (q[i + 16] & 15) << 4);
    }
}

/* the fifth bit in front of the four others */
static inline void write_five_bits(uint8_t *to, const int32_t *q) {
    uint32_t high = 0;
    for (int i = 0; i < BLOCK; i++) {
        high |= (uint32_t)(q[i] >> 4 & 1) << i;
    }
    memcpy(to, &high, 4);
    write_four_bits(to + 4, q);
}

/* A chunk of a type of four or five bits, with an offset (Q4_1, Q5_1) or without. */
static inline void quantize_bits(const Chunk *chunk, int bits, bool offset) {
    const int most = (1 << bits) - 1, middle = 1 << (bits - 1);
    const int bytes = 2 + 2 * offset + 4 * bits;
    Found found;
    if (chunk->moments) {
        float means[BLOCKS], importance[CHUNK];
        for (int block = 0; block < BLOCKS; block++) {
            means[block] = chunk->mean_square;
        }
        weigh(chunk, BLOCK, means, importance);
        for (int at = 0; at < BLOCKS; at += LANES) {
            floats x[BLOCK], w[BLOCK];
            load(chunk->x + BLOCK * at, BLOCK, x);
            load(importance + BLOCK * at, BLOCK, w);
            if (offset) {
                search_with_offset(x, w, BLOCK, most, -0.9f, 0.05f, 36, false, &found, at);
            } else {
                search_symmetric(x, w, BLOCK, middle, &found, at);
            }
        }
    }

    uint8_t *out = chunk->out;
    for (int block = 0; block < chunk->blocks; block++, out += bytes) {
        const float *x = chunk->x + BLOCK * block;
        int32_t q[BLOCK];
        float d, low = 0.0f;
        if (chunk->moments) {
            d = found.scale[block];
            low = -found.offset[block];
            round_as_found(&found, block, x, BLOCK, offset ? 0 : -middle, offset ? most : middle - 1, q);
        } else if (offset) {
            float high;
            extremes(x, &low, &high);
            d = (high - low) / (float)most;
            round_down(x, low, d == 0.0f ? 0.0f : 1.0f / d, 0.5f, bits == 4 ? most : 127, q);
        } else {
            d = outermost_weight(x) / -(float)middle;
            round_down(x, 0.0f, d == 0.0f ? 0.0f : 1.0f / d, (float)middle + 0.5f, most, q);
        }
        write_half(out, d);
        uint8_t *rest = out + 2;
        if (offset) {
            write_half(out + 2, low);
            rest = out + 4;
        }
        if (bits == 4) {
            write_four_bits(rest, q);
        } else {
            write_five_bits(rest, q);
        }
    }
}

/* 18 bytes: d[2] qs[16]; x = d (q - 8) */
static void chunk_q4_0(const Chunk *chunk) { quantize_bits(chunk, 4, false); }

/* 20 bytes: d[2] m[2] qs[16]; x = d q + m */
static void chunk_q4_1(const Chunk *chunk) { quantize_bits(chunk, 4, true); }

/* 22 bytes: d[2] qh[4] qs[16]; x = d (q - 16) */
static void chunk_q5_0(const Chunk *chunk) { quantize_bits(chunk, 5, false); }

/* 24 bytes: d[2] m[2] qh[4] qs[16]; x = d q + m */
static void chunk_q5_1(const Chunk *chunk) { quantize_bits(chunk, 5, true); }

/* 34 bytes: d[2] qs[32]; x = d q; ggml does not look at moments */
static void chunk_q8_0(const Chunk *chunk) {
    uint8_t *out = chunk->out;
    for (int block = 0; block < chunk->blocks; block++, out += 34) {
        const float *x = chunk->x + BLOCK * block;
        const float d = fabsf(outermost_weight(x)) / 127.0f, inverse = d == 0.0f ? 0.0f : 1.0f / d;
        write_half(out, d);
        for (int i = 0; i < BLOCK; i++) { /* halves away from zero */
            const float scaled = x[i] * inverse;
            out[2 + i] = (uint8_t)(int32_t)(scaled + copysignf(0x1.fffffep-2f, scaled));
        }
    }
}

API void quantize_q4_0(const float *x, const float *moments, uint8_t *out, int64_t rows, int64_t columns) {
    in_chunks(x, moments, out, rows, columns, BLOCK, 18, true, chunk_q4_0);
}

API void quantize_q4_1(const float *x, const float *moments, uint8_t *out, int64_t rows, int64_t columns) {
    in_chunks(x, moments, out, rows, columns, BLOCK, 20, true, chunk_q4_1);
}

API void quantize_q5_0(const float *x, const float *moments, uint8_t *out, int64_t rows, int64_t columns) {
    in_chunks(x, moments, out, rows, columns, BLOCK, 22, true, chunk_q5_0);
}

API void quantize_q5_1(const float *x, const float *moments, uint8_t *out, int64_t rows, int64_t columns) {
    in_chunks(x, moments, out, rows, columns, BLOCK, 24, true, chunk_q5_1);
}

API void quantize_q8_0(const float *x, const float *moments, uint8_t *out, int64_t rows, int64_t columns) {
    (void)moments;
    in_chunks(x, NULL, out, rows, columns, BLOCK, 34, false, chunk_q8_0);
}
