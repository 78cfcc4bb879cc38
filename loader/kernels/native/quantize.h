/*
 * What the quantizers share: vectors in which each lane has a sub-block of its own, and ggml's searches for scales.
 *
 * ggml tries many scales for each sub-block of 16 or 32 weights, one sub-block after the other, in chains of dependent
 * additions that no compiler may reorder. Here as many sub-blocks as a vector register has lanes go side by side, so
 * that every sum is added up in ggml's order. A vector is as wide as the processor's registers: compilers take a wider
 * one apart lane by lane.
 *
 * Rows are taken in chunks of 512 weights, as many sub-blocks as fill the widest register. Formulas: make_qx_quants,
 * make_qkx2_quants, make_qkx3_quants, make_qp_quants and make_q3_quants in ggml's ggml-quants.c.
 */
#include <math.h>
#include <stdbool.h>

#include "native.h"

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

enum { CHUNK = 512, SUB_BLOCK = 32, SUB_BLOCKS = CHUNK / 16 }; /* at most: of weights, of sub-blocks in a chunk */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

static inline floats all(float value) { return value - (floats){0}; }

static inline floats loaded(const float *from) {
    floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

static inline void store(float *to, floats values) { memcpy(to, &values, sizeof values); }

static inline void store_ints(int32_t *to, ints values) { memcpy(to, &values, sizeof values); }

static inline ints loaded_ints(const int32_t *from) {
    ints values;
    memcpy(&values, from, sizeof values);
    return values;
}

/* The low eight bits of each. A function of its own: gcc takes it apart where it is inlined. */
__attribute__((noinline)) static void to_bytes(const int32_t *restrict from, uint8_t *restrict to, int n) {
    for (int i = 0; i < n; i++) {
        to[i] = (uint8_t)from[i];
    }
}

static inline floats floats_of(ints values) { return __builtin_convertvector(values, floats); }

static inline floats size_of(floats values) { return (floats)((ints)values & 0x7fffffff); }

static inline floats root_of(floats values) {
    for (int lane = 0; lane < LANES; lane++) {
        values[lane] = sqrtf(values[lane]);
    }
    return values;
}

/* where the mask is set the first, elsewhere the second */
static inline floats chosen(ints mask, floats first, floats second) {
    return (floats)((mask & (ints)first) | (~mask & (ints)second));
}

/* the first where it is less than the second, elsewhere the second: one instruction, by which compilers know it */
static inline floats lesser(floats first, floats second) {
    for (int lane = 0; lane < LANES; lane++) {
        first[lane] = first[lane] < second[lane] ? first[lane] : second[lane];
    }
    return first;
}

static inline floats greater(floats first, floats second) {
    for (int lane = 0; lane < LANES; lane++) {
        first[lane] = first[lane] > second[lane] ? first[lane] : second[lane];
    }
    return first;
}

static inline bool any(ints mask) {
    bool found = false;
    for (int lane = 0; lane < LANES; lane++) {
        found |= mask[lane] != 0;
    }
    return found;
}

/* ggml's nearest_int */
static inline ints nearest(floats value) {
    const ints bits = (ints)(value + 12582912.0f);
    return (bits & 0x007fffff) - 0x00400000;
}

static inline int nearest_int(float value) {
    return (int)(bits_of_float(value + 12582912.0f) & 0x007fffff) - 0x00400000;
}

static inline ints at_most(ints values, int most) {
    for (int lane = 0; lane < LANES; lane++) {
        values[lane] = values[lane] < most ? values[lane] : most;
    }
    return values;
}

static inline ints clamped(ints values, int least, int most) {
    for (int lane = 0; lane < LANES; lane++) {
        values[lane] = values[lane] > least ? values[lane] : least;
    }
    return at_most(values, most);
}

static inline int clamped_int(int value, int least, int most) {
    return value < least ? least : value > most ? most : value;
}

/* that of the greatest size, the first of them */
static inline float outermost_of(const float *values, int n) {
    float outermost = 0.0f;
    for (int i = 0; i < n; i++) {
        outermost = fabsf(values[i]) > fabsf(outermost) ? values[i] : outermost;
    }
    return outermost;
}

/* the bits of the nearest 16-bit floats, halves to even */
static inline ints halves_of(floats values) {
    const ints sign = (ints)values >> 16 & 0x8000;
    const ints bits = (ints)values & 0x7fffffff;
    const ints small = (ints)((floats)bits + 0.5f) - 0x3f000000; /* below the least normal number */
    const ints normal = (bits + 0x0fff + (bits >> 13 & 1) - 0x38000000) >> 13;
    const ints is_small = bits < 0x38800000, half = (is_small & small) | (~is_small & at_most(normal, 0x7c00));
    return sign | half;
}

static inline void write_half_bits(uint8_t *to, int32_t bits) {
    const uint16_t half = (uint16_t)bits;
    memcpy(to, &half, 2);
}

/* writes it as a 16-bit float, and returns what it is when read again */
static inline float write_half(uint8_t *to, float value) {
    write_half_bits(to, halves_of(all(value))[0]);
    return half_at(to);
}

/* Some blocks of a row, and zeros up to CHUNK weights. */
typedef struct {
    const float *x;
    const float *moments; /* of each column, or NULL */
    float mean_square;    /* of the row, if asked for and there are moments */
    int blocks;
    uint8_t *out;
} Chunk;

/* Takes rows chunk by chunk to work. */
static inline void in_chunks(const float *weights, const float *moments, uint8_t *out, int64_t rows, int64_t columns,
                             int block, int bytes, bool by_row, void (*work)(const Chunk *)) {
    float padded[CHUNK], padded_moments[CHUNK];
    for (int64_t row = 0; row < rows; row++) {
        float mean_square = 0.0f;
        if (by_row && moments) {
            for (int64_t i = 0; i < columns; i++) {
                mean_square += weights[i] * weights[i];
            }
            mean_square /= (float)columns;
        }
        for (int64_t column = 0; column < columns; column += CHUNK, weights += CHUNK) {
            Chunk chunk = {weights, moments ? moments + column : NULL, mean_square, CHUNK / block, out};
            const int64_t rest = columns - column;
            if (rest < CHUNK) {
                memset(padded, 0, sizeof padded);
                memcpy(padded, weights, sizeof(float) * (size_t)rest);
                chunk.x = padded;
                if (moments) {
                    memset(padded_moments, 0, sizeof padded_moments);
                    memcpy(padded_moments, moments + column, sizeof(float) * (size_t)rest);
                    chunk.moments = padded_moments;
                }
                chunk.blocks = (int)rest / block;
                weights -= CHUNK - rest;
            }
            work(&chunk);
            out += chunk.blocks * bytes;
        }
    }
}

/* The exported function of a type: blocks of so many weights and bytes, which `chunk_<name>` packs. */
#define QUANTIZER(name, block, bytes, by_row)                                                                        \
    API void quantize_##name(const float *x, const float *moments, uint8_t *out, int64_t rows, int64_t columns) {    \
        in_chunks(x, moments, out, rows, columns, block, bytes, by_row, chunk_##name);                               \
    }

/* Each lane's sub-block of n weights. */
static inline void load(const float *from, int n, floats *x) {
    for (int i = 0; i < n; i++) {
        float lanes[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            lanes[lane] = from[n * lane + i];
        }
        x[i] = loaded(lanes);
    }
}

/* the mean square of each block of a chunk, times a factor */
static inline void mean_squares(const Chunk *chunk, int block, float factor, float *means) {
    const int blocks = CHUNK / block;
    for (int b = 0; b < blocks; b++) {
        means[b] = 0.0f;
    }
    for (int i = 0; i < block; i++) {
        for (int b = 0; b < blocks; b++) {
            const float x = chunk->x[block * b + i];
            means[b] += x * x;
        }
    }
    for (int b = 0; b < blocks; b++) {
        means[b] = factor * means[b] / (float)block;
    }
}

/* what the moments make of the importance of each weight of a chunk, given the mean square of each block */
static inline void weigh(const Chunk *chunk, int block, const float *means, float *importance) {
    for (int i = 0; i < CHUNK; i += LANES) {
        const floats x = loaded(chunk->x + i);
        store(importance + i, loaded(chunk->moments + i) * root_of(means[i / block] + x * x));
    }
}

/* What a search finds for each sub-block of a chunk: x ≈ scale q - offset. */
typedef struct {
    float scale[SUB_BLOCKS], offset[SUB_BLOCKS];
    float inverse[SUB_BLOCKS], base[SUB_BLOCKS]; /* q is the nearest to inverse (x - base), and 0 if inverse is 0 */
    float importance[SUB_BLOCKS];                /* of all its weights */
} Found;

/* q from 0 to most, with an offset that is not negative; from the sub-block number `at` on, one in each lane */
static inline void search_with_offset(const floats *x, const floats *importance, int n, int most, float first,
                                      float delta, int steps, bool absolute, Found *found, int at) {
    floats low = x[0], high = x[0], sum_w = importance[0], sum_x = importance[0] * x[0];
    for (int i = 1; i < n; i++) {
        low = chosen(x[i] < low, x[i], low);
        high = chosen(x[i] > high, x[i], high);
        sum_w += importance[i];
        sum_x += importance[i] * x[i];
    }
    low = chosen(low > 0.0f, all(0.0f), low);
    const ints flat = high == low;
    const floats lowest = low;

    /* an improvement moves the base of the steps after it */
    floats best_inverse = (float)most / (high - low), best_base = low;
    floats scale = 1.0f / best_inverse, best = all(0.0f);
    for (int i = 0; i < n; i++) {
        const floats q = floats_of(clamped(nearest(best_inverse * (x[i] - low)), 0, most));
        const floats difference = scale * q + low - x[i];
        best += importance[i] * (absolute ? size_of(difference) : difference * difference);
    }
    for (int step = 0; step <= steps; step++) {
        const floats inverse = (first + delta * (float)step + (float)most) / (high - low);
        floats q[SUB_BLOCK], sum_q = all(0.0f), sum_qq = all(0.0f), sum_xq = all(0.0f);
        for (int i = 0; i < n; i++) {
            q[i] = floats_of(clamped(nearest(inverse * (x[i] - low)), 0, most));
            const floats weighted = importance[i] * q[i];
            sum_q += weighted;
            sum_qq += weighted * q[i];
            sum_xq += weighted * x[i];
        }
        const floats determinant = sum_w * sum_qq - sum_q * sum_q;
        floats this_scale = (sum_w * sum_xq - sum_x * sum_q) / determinant;
        floats this_low = (sum_qq * sum_x - sum_q * sum_xq) / determinant;
        const ints positive = this_low > 0.0f;
        this_scale = chosen(positive, sum_xq / sum_qq, this_scale);
        this_low = chosen(positive, all(0.0f), this_low);
        floats error = all(0.0f);
        for (int i = 0; i < n; i++) {
            const floats difference = this_scale * q[i] + this_low - x[i];
            error += importance[i] * (absolute ? size_of(difference) : difference * difference);
        }
        const ints better = (determinant > 0.0f) & (error < best);
        best = chosen(better, error, best);
        scale = chosen(better, this_scale, scale);
        best_inverse = chosen(better, inverse, best_inverse);
        best_base = chosen(better, low, best_base);
        low = chosen(better, this_low, low);
    }
    store(found->scale + at, chosen(flat, all(0.0f), scale));
    store(found->offset + at, -chosen(flat, lowest, low));
    store(found->inverse + at, chosen(flat, all(0.0f), best_inverse));
    store(found->base + at, best_base);
    store(found->importance + at, sum_w);
}

/* q from -most to most - 1, without an offset */
static inline void search_symmetric(const floats *x, const floats *importance, int n, int most, Found *found, int at) {
    floats size = all(0.0f), outermost = all(0.0f), sum_w = all(0.0f), weighted[SUB_BLOCK];
    for (int i = 0; i < n; i++) {
        const ints greater = size_of(x[i]) > size;
        size = chosen(greater, size_of(x[i]), size);
        outermost = chosen(greater, x[i], outermost);
        sum_w += importance[i];
        weighted[i] = importance[i] * x[i];
    }
    floats scale = all(0.0f), best = all(0.0f), best_inverse = -(float)most / outermost;
    for (int try = -10; try <= 9; try++) { /* 0 comes first, in place of -10 */
        if (try == 0) {
            continue;
        }
        const bool first = try == -10;
        const floats inverse = -((float)most + 0.1f * (float)(first ? 0 : try)) / outermost;
        floats sum_xq = all(0.0f), sum_qq = all(0.0f);
        for (int i = 0; i < n; i++) {
            const floats q = floats_of(clamped(nearest(inverse * x[i]), -most, most - 1));
            sum_xq += weighted[i] * q;
            sum_qq += importance[i] * q * q;
        }
        ints better = sum_qq > 0.0f;
        if (!first) {
            better &= sum_xq * sum_xq > best * sum_qq;
        }
        scale = chosen(better, sum_xq / sum_qq, scale);
        best = chosen(better, scale * sum_xq, best);
        best_inverse = chosen(better, inverse, best_inverse);
    }
    const ints zero = size < 1e-15f;
    store(found->scale + at, chosen(zero, all(0.0f), scale));
    store(found->offset + at, all(0.0f));
    store(found->inverse + at, chosen(zero, all(0.0f), best_inverse));
    store(found->base + at, all(0.0f));
    store(found->importance + at, sum_w);
}

/*
 * One weight after the other goes to where the error is least, until none moves. The sums are those of the q given,
 * which are kept in as many bits as ggml keeps. Each step waits for the one before: several vectors, weight by weight
 * beside each other in x, importance and q, take their steps in turns.
 */
static inline void descend(const floats *x, const floats *importance, ints *q, int n, int vectors, int least, int most,
                           int bits, bool positive, floats *sum_xq, floats *sum_qq) {
    for (int round = 0; round < 5; round++) {
        ints moved = {0};
        for (int i = 0; i < n; i++) {
            for (int vector = 0; vector < vectors; vector++) {
                const int at = vectors * i + vector;
                const floats from = floats_of(q[at]), weighted = importance[at] * x[at];
                floats xq = sum_xq[vector] - weighted * from, qq = sum_qq[vector] - importance[at] * from * from;
                ints better = xq > 0.0f;
                if (positive) {
                    better &= qq > 0.0f;
                }
                const ints target = clamped(nearest(x[at] * qq / xq), least, most);
                const floats to = floats_of(target);
                xq += weighted * to;
                qq += importance[at] * to * to;
                better &= (target != q[at]) & (qq > 0.0f);
                better &= xq * xq * sum_qq[vector] > sum_xq[vector] * sum_xq[vector] * qq;
                q[at] = (better & target & bits) | (~better & q[at]);
                sum_xq[vector] = chosen(better, xq, sum_xq[vector]);
                sum_qq[vector] = chosen(better, qq, sum_qq[vector]);
                moved |= better;
            }
        }
        if (!any(moved)) {
            return;
        }
    }
}

/* q of what the search found, from 0 on */
static inline void round_as_found(const Found *found, int sub_block, const float *x, int n, int least, int most,
                                  int32_t *q) {
    const float inverse = found->inverse[sub_block], base = found->base[sub_block];
    for (int i = 0; i < n; i++) {
        q[i] = inverse == 0.0f ? 0 : clamped_int(nearest_int(inverse * (x[i] - base)), least, most) - least;
    }
}

/* q of a scale and an offset, from 0 on */
static inline void round_by(float scale, float offset, const float *x, int n, int least, int most, int32_t *q) {
    for (int i = 0; i < n; i++) {
        q[i] = clamped_int(nearest_int((x[i] + offset) / scale), least, most) - least;
    }
}
