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

enum { BLOCK = 32, BLOCKS = CHUNK / BLOCK, PAGE = 4096 / sizeof(float) };

/* the first weight of a block of which this is the value, or the first zero: those have two signs */
static float first_equal(const float *x, float value) {
    int i = 0;
    while (i < BLOCK - 1 && x[i] != value) {
        i++;
    }
    return x[i];
}

/* the first weight of a block that has this size */
static float first_outermost(const float *x, float size) {
    int i = 0;
    while (i < BLOCK - 1 && fabsf(x[i]) != size) {
        i++;
    }
    return size == 0.0f ? 0.0f : x[i];
}

typedef float four __attribute__((vector_size(16)));

/* of two vectors the floats at four places: 0 to 3 are the first's, 4 to 7 the second's */
#if defined(__clang__) || __GNUC__ >= 12
#define PICKED(first, second, ...) __builtin_shufflevector(first, second, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(16)));
#define PICKED(first, second, ...) __builtin_shuffle(first, second, (places){__VA_ARGS__})
#endif

static inline four four_at(const float *from) {
    four values;
    memcpy(&values, from, sizeof values);
    return values;
}

static inline four lesser_four(four first, four second) {
    for (int i = 0; i < 4; i++) {
        first[i] = first[i] < second[i] ? first[i] : second[i];
    }
    return first;
}

/* the least of each of four times LANES floats */
static inline four least_of_each(const float *from) {
    four v[4];
    for (int i = 0; i < 4; i++, from += LANES) {
        v[i] = four_at(from);
        for (int lane = 4; lane < LANES; lane += 4) {
            v[i] = lesser_four(four_at(from + lane), v[i]);
        }
    }
    const four first = lesser_four(PICKED(v[0], v[1], 0, 4, 1, 5), PICKED(v[0], v[1], 2, 6, 3, 7));
    const four second = lesser_four(PICKED(v[2], v[3], 0, 4, 1, 5), PICKED(v[2], v[3], 2, 6, 3, 7));
    return lesser_four(PICKED(first, second, 0, 1, 4, 5), PICKED(first, second, 2, 3, 6, 7));
}

/*
 * The least and the greatest weight of each block of a chunk. Who comes first asks for the weights of the next page
 * too: the processor's own prefetching ends with a page.
 */
static inline void extremes(const float *x, float *low, float *high) {
    for (int at = 0; at < BLOCKS; at += 4, x += 4 * BLOCK) {
        float lows[4 * LANES], highs[4 * LANES];
        for (int block = 0; block < 4; block++) {
            const float *own = x + BLOCK * block;
            __builtin_prefetch(own + PAGE);
            __builtin_prefetch(own + PAGE + BLOCK / 2);
            floats least = loaded(own), most = least;
            for (int i = LANES; i < BLOCK; i += LANES) {
                const floats next = loaded(own + i);
                least = lesser(next, least);
                most = greater(next, most);
            }
            store(lows + LANES * block, least);
            store(highs + LANES * block, -most);
        }
        const four least = least_of_each(lows), most = -least_of_each(highs);
        memcpy(low + at, &least, sizeof least);
        memcpy(high + at, &most, sizeof most);
    }
}

/* Without moments: each block's scale, the inverse of it, and the offset of the types that have one. */
static inline void scale_by_extremes(const Chunk *chunk, int bits, bool offset, float *d, float *inverse, float *low) {
    float high[BLOCKS];
    extremes(chunk->x, low, high);
    for (int at = 0; at < BLOCKS; at += LANES) {
        floats least = loaded(low + at), most = loaded(high + at);
        const ints two_signs = offset ? (least == 0.0f) | (most == 0.0f) : -least == most;
        if (any(two_signs)) {
            for (int block = at; block < at + LANES; block++) {
                const float *x = chunk->x + BLOCK * block;
                if (offset) {
                    low[block] = low[block] == 0.0f ? first_equal(x, 0.0f) : low[block];
                    high[block] = high[block] == 0.0f ? first_equal(x, 0.0f) : high[block];
                } else if (-low[block] == high[block]) {
                    high[block] = first_outermost(x, high[block]);
                }
            }
            least = loaded(low + at);
            most = loaded(high + at);
        }
        floats scale;
        if (offset) {
            scale = (most - least) / (float)((1 << bits) - 1);
        } else {
            scale = chosen(-least > most, least, most) / -(float)(1 << (bits - 1));
            store(low + at, all(0.0f));
        }
        store(d + at, scale);
        store(inverse + at, chosen(scale == 0.0f, all(0.0f), 1.0f / scale));
    }
}

/* q of (x - low) inverse, rounded down after `half` is added, in ggml's eight bits: 0 of what is none */
static inline void round_down(const float *x, float low, float inverse, float half, int most, int32_t *q) {
    UNROLLED
    for (int i = 0; i < BLOCK; i += LANES) {
        const ints rounded = __builtin_convertvector((loaded(x + i) - low) * inverse + half, ints);
        store_ints(q + i, at_most(rounded & 255, most));
    }
}

/* the fifth bit of each weight of a block */
static inline uint32_t fifth_bits(const int32_t *q) {
    uint32_t bits = 0;
    for (int i = 0; i < BLOCK; i++) {
        bits |= (uint32_t)(q[i] >> 4 & 1) << i;
    }
    return bits;
}

static inline void halves_in(const float *values, int32_t *halves) {
    for (int at = 0; at < BLOCKS; at += LANES) {
        store_ints(halves + at, halves_of(loaded(values + at)));
    }
}

/* A chunk of a type of four or five bits, with an offset (Q4_1, Q5_1) or without. */
static inline void quantize_bits(const Chunk *chunk, int bits, bool offset) {
    const int most = (1 << bits) - 1, middle = 1 << (bits - 1);
    const int bytes = 2 + 2 * offset + 4 * bits;
    float d[BLOCKS], low[BLOCKS], inverse[BLOCKS];
    Found found;
    if (!chunk->moments) {
        scale_by_extremes(chunk, bits, offset, d, inverse, low);
    } else {
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
            store(d + at, loaded(found.scale + at));
            store(low + at, -loaded(found.offset + at));
        }
    }

    int32_t half_d[BLOCKS], half_low[BLOCKS];
    halves_in(d, half_d);
    halves_in(low, half_low);
    int32_t pairs[CHUNK / 2];
    uint32_t fifth[BLOCKS];
    for (int block = 0; block < BLOCKS; block++) {
        const float *x = chunk->x + BLOCK * block;
        int32_t q[BLOCK];
        if (chunk->moments) {
            round_as_found(&found, block, x, BLOCK, offset ? 0 : -middle, offset ? most : middle - 1, q);
        } else if (offset) {
            round_down(x, low[block], inverse[block], 0.5f, bits == 4 ? most : 255, q);
        } else {
            round_down(x, 0.0f, inverse[block], (float)middle + 0.5f, most, q);
        }
        UNROLLED
        for (int i = 0; i < 16; i += LANES) {
            store_ints(pairs + 16 * block + i, (loaded_ints(q + i) & 15) | loaded_ints(q + 16 + i) << 4);
        }
        if (bits == 5) {
            fifth[block] = fifth_bits(q);
        }
    }
    uint8_t qs[CHUNK / 2];
    to_bytes(pairs, qs, CHUNK / 2);
    uint8_t *out = chunk->out;
    for (int block = 0; block < chunk->blocks; block++, out += bytes) {
        write_half_bits(out, half_d[block]);
        if (offset) {
            write_half_bits(out + 2, half_low[block]);
        }
        if (bits == 5) {
            memcpy(out + bytes - 20, fifth + block, 4);
        }
        memcpy(out + bytes - 16, qs + 16 * block, 16);
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
    float low[BLOCKS], high[BLOCKS], inverse[BLOCKS];
    int32_t half_d[BLOCKS];
    extremes(chunk->x, low, high);
    for (int at = 0; at < BLOCKS; at += LANES) {
        const floats least = loaded(low + at), most = loaded(high + at);
        const floats d = size_of(chosen(-least > most, least, most)) / 127.0f;
        store(high + at, d);
        store(inverse + at, chosen(d == 0.0f, all(0.0f), 1.0f / d));
    }
    halves_in(high, half_d);
    int32_t q[CHUNK];
    uint8_t qs[CHUNK];
    for (int i = 0; i < CHUNK; i += LANES) { /* halves away from zero */
        const floats scaled = loaded(chunk->x + i) * inverse[i / BLOCK];
        const ints half = (ints)all(0x1.fffffep-2f) | ((ints)scaled & INT32_MIN);
        store_ints(q + i, __builtin_convertvector(scaled + (floats)half, ints));
    }
    to_bytes(q, qs, CHUNK);
    uint8_t *out = chunk->out;
    for (int block = 0; block < chunk->blocks; block++, out += 34) {
        write_half_bits(out, half_d[block]);
        memcpy(out + 2, qs + BLOCK * block, BLOCK);
    }
}

QUANTIZER(q4_0, BLOCK, 18, true)
QUANTIZER(q4_1, BLOCK, 20, true)
QUANTIZER(q5_0, BLOCK, 22, true)
QUANTIZER(q5_1, BLOCK, 24, true)
QUANTIZER(q8_0, BLOCK, 34, false)
