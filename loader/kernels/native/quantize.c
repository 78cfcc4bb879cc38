/*
 * Q4_K and Q5_K as ggml packs them without an importance matrix: the same bytes, several times as fast.
 *
 * ggml tries about twenty scales for each sub-block of 32 weights, one sub-block after the other, in chains of dependent
 * additions that no compiler may reorder. Here each lane of a vector register has a sub-block of its own, so that every
 * sum is added up in ggml's order.
 *
 * Formulas and layouts: make_qkx2_quants and quantize_row_q4_K_ref and _q5_K_ref in ggml's ggml-quants.c.
 */
#include <math.h>

#include "native.h"

enum { BLOCK = 256, SUB_BLOCK = 32, SUB_BLOCKS = BLOCK / SUB_BLOCK, BLOCKS = 2, LANES = BLOCKS * SUB_BLOCKS };

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

static inline floats all(float value) { return value - (floats){0}; }

/* where the mask is set the first, elsewhere the second */
static inline floats chosen(ints mask, floats first, floats second) {
    return (floats)((mask & (ints)first) | (~mask & (ints)second));
}

static inline ints chosen_ints(ints mask, ints first, ints second) { return (mask & first) | (~mask & second); }

/* ggml's nearest_int, clamped */
static inline ints nearest(floats value, int most) {
    ints bits = (ints)(value + 12582912.0f);
    bits = (bits & 0x007fffff) - 0x00400000;
    bits = chosen_ints(bits < 0, bits - bits, bits);
    return chosen_ints(bits > most, bits - bits + most, bits);
}

static inline int nearest_int(float value) {
    return (int)(bits_of_float(value + 12582912.0f) & 0x007fffff) - 0x00400000;
}

/* to the nearest 16-bit float, halves to even; of a number that is not negative */
static inline uint16_t half_of(float value) {
    uint32_t bits = bits_of_float(value);
    if (bits < 0x38800000) { /* below the least normal number */
        return (uint16_t)(bits_of_float(value + 0.5f) - 0x3f000000);
    }
    bits += 0x0fff + (bits >> 13 & 1);
    return (uint16_t)(bits >= 0x47800000 ? 0x7c00 : (bits - 0x38000000) >> 13);
}

/* What the search finds for each lane's sub-block: x ≈ scale q - offset, q from 0 to most. */
typedef struct {
    floats scale, offset;
    ints q[SUB_BLOCK];
} Found;

static inline void search(const float *weights, int most, float first_step, int steps, Found *found) {
    floats x[SUB_BLOCK], importance[SUB_BLOCK];
    for (int i = 0; i < SUB_BLOCK; i++) {
        for (int lane = 0; lane < LANES; lane++) {
            x[i][lane] = weights[SUB_BLOCK * lane + i];
        }
    }
    floats squares = all(0.0f);
    for (int i = 0; i < SUB_BLOCK; i++) {
        squares += x[i] * x[i];
    }
    floats mean = squares / (float)SUB_BLOCK;
    for (int lane = 0; lane < LANES; lane++) {
        mean[lane] = sqrtf(mean[lane]);
    }
    for (int i = 0; i < SUB_BLOCK; i++) {
        importance[i] = mean + (floats)((ints)x[i] & 0x7fffffff);
    }

    floats low = x[0], high = x[0], sum_w = importance[0], sum_x = importance[0] * x[0];
    for (int i = 1; i < SUB_BLOCK; i++) {
        low = chosen(x[i] < low, x[i], low);
        high = chosen(x[i] > high, x[i], high);
        sum_w += importance[i];
        sum_x += importance[i] * x[i];
    }
    low = chosen(low > 0.0f, all(0.0f), low);
    const ints flat = high == low;
    const floats lowest = low;

    /* q is the nearest to inverse (x - base); an improvement moves the base of the steps after it */
    floats best_inverse = (float)most / (high - low), best_base = low;
    floats scale = 1.0f / best_inverse, best = all(0.0f);
    for (int i = 0; i < SUB_BLOCK; i++) {
        const floats q = __builtin_convertvector(nearest(best_inverse * (x[i] - low), most), floats);
        const floats difference = scale * q + low - x[i];
        best += importance[i] * (difference * difference);
    }
    for (int step = 0; step <= steps; step++) {
        const floats inverse = (first_step + 0.1f * (float)step + (float)most) / (high - low);
        floats q[SUB_BLOCK], sum_q = all(0.0f), sum_qq = all(0.0f), sum_xq = all(0.0f);
        for (int i = 0; i < SUB_BLOCK; i++) {
            q[i] = __builtin_convertvector(nearest(inverse * (x[i] - low), most), floats);
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
        for (int i = 0; i < SUB_BLOCK; i++) {
            const floats difference = this_scale * q[i] + this_low - x[i];
            error += importance[i] * (difference * difference);
        }
        const ints better = (determinant > 0.0f) & (error < best);
        best = chosen(better, error, best);
        scale = chosen(better, this_scale, scale);
        best_inverse = chosen(better, inverse, best_inverse);
        best_base = chosen(better, low, best_base);
        low = chosen(better, this_low, low);
    }
    found->scale = chosen(flat, all(0.0f), scale);
    found->offset = -chosen(flat, lowest, low);
    for (int i = 0; i < SUB_BLOCK; i++) {
        found->q[i] = ~flat & nearest(best_inverse * (x[i] - best_base), most);
    }
}

/* The search's lanes of one block, the scales and offsets packed in six bits each. */
static inline void pack_scales(const Found *found, int lane, uint8_t *head, uint8_t *scales, uint8_t *offsets) {
    float most_scale = 0.0f, most_offset = 0.0f;
    for (int i = 0; i < SUB_BLOCKS; i++) {
        most_scale = found->scale[lane + i] > most_scale ? found->scale[lane + i] : most_scale;
        most_offset = found->offset[lane + i] > most_offset ? found->offset[lane + i] : most_offset;
    }
    const float inverse_scale = most_scale > 0.0f ? 63.0f / most_scale : 0.0f;
    const float inverse_offset = most_offset > 0.0f ? 63.0f / most_offset : 0.0f;
    const uint16_t d = half_of(most_scale / 63.0f), dmin = half_of(most_offset / 63.0f);
    memcpy(head, &d, 2);
    memcpy(head + 2, &dmin, 2);
    uint8_t *packed = head + 4;
    memset(packed, 0, 12);
    for (int i = 0; i < SUB_BLOCKS; i++) {
        uint8_t scale = (uint8_t)nearest_int(inverse_scale * found->scale[lane + i]);
        uint8_t offset = (uint8_t)nearest_int(inverse_offset * found->offset[lane + i]);
        scale = scale < 63 ? scale : 63;
        offset = offset < 63 ? offset : 63;
        if (i < 4) {
            packed[i] = scale;
            packed[i + 4] = offset;
        } else {
            packed[i + 4] = (uint8_t)((scale & 15) | (offset & 15) << 4);
            packed[i - 4] |= (uint8_t)(scale >> 4 << 6);
            packed[i] |= (uint8_t)(offset >> 4 << 6);
        }
        scales[i] = scale;
        offsets[i] = offset;
    }
}

/* The weights of one block with the scales that its head holds. */
static inline void round_weights(const float *x, const Found *found, int lane, int most, uint8_t *head, uint8_t *q) {
    uint8_t scales[SUB_BLOCKS], offsets[SUB_BLOCKS];
    pack_scales(found, lane, head, scales, offsets);
    for (int i = 0; i < SUB_BLOCKS; i++, x += SUB_BLOCK, q += SUB_BLOCK) {
        const float d = half_at(head) * (float)scales[i], offset = half_at(head + 2) * (float)offsets[i];
        for (int j = 0; j < SUB_BLOCK; j++) {
            if (d == 0.0f) { /* then ggml leaves what the search found */
                q[j] = (uint8_t)found->q[j][lane + i];
                continue;
            }
            const int nearest = nearest_int((x[j] + offset) / d);
            q[j] = (uint8_t)(nearest < 0 ? 0 : nearest > most ? most : nearest);
        }
    }
}

/* 144 bytes, 256 weights: d[2] dmin[2] scales[12] qs[128] */
static void write_q4_k(uint8_t *out, const uint8_t *q) {
    uint8_t *qs = out + 16;
    for (int pair = 0; pair < 4; pair++, q += 64, qs += 32) {
        for (int i = 0; i < 32; i++) {
            qs[i] = (uint8_t)(q[i] | q[i + 32] << 4);
        }
    }
}

/* 176 bytes, 256 weights: d[2] dmin[2] scales[12] qh[32] qs[128] */
static void write_q5_k(uint8_t *out, const uint8_t *q) {
    uint8_t *qh = out + 16, *qs = out + 48;
    memset(qh, 0, 32);
    for (int pair = 0; pair < 4; pair++, q += 64, qs += 32) {
        for (int i = 0; i < 32; i++) {
            qs[i] = (uint8_t)((q[i] & 15) | (q[i + 32] & 15) << 4);
            qh[i] |= (uint8_t)((q[i] >> 4 | q[i + 32] >> 4 << 1) << 2 * pair);
        }
    }
}

static inline void quantize(const float *restrict weights, uint8_t *restrict out, int64_t blocks, int bits,
                            float first_step, int steps, int bytes, void (*write)(uint8_t *, const uint8_t *)) {
    const int most = (1 << bits) - 1;
    float padded[BLOCKS * BLOCK];
    Found found;
    uint8_t q[BLOCK];
    for (int64_t block = 0; block < blocks; block += BLOCKS) {
        const float *x = weights + BLOCK * block;
        if (block + BLOCKS > blocks) { /* the last one alone, beside zeros */
            memset(padded, 0, sizeof padded);
            memcpy(padded, x, sizeof(float) * BLOCK);
            x = padded;
        }
        search(x, most, first_step, steps, &found);
        for (int i = 0; i < BLOCKS && block + i < blocks; i++, out += bytes) {
            round_weights(x + BLOCK * i, &found, SUB_BLOCKS * i, most, out, q);
            write(out, q);
        }
    }
}

API void quantize_q4_k(const float *weights, uint8_t *out, int64_t blocks) {
    quantize(weights, out, blocks, 4, -1.0f, 20, 144, write_q4_k);
}

API void quantize_q5_k(const float *weights, uint8_t *out, int64_t blocks) {
    quantize(weights, out, blocks, 5, -0.5f, 15, 176, write_q5_k);
}
