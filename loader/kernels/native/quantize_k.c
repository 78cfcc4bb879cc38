/*
 * Q2_K to Q6_K as ggml packs them, with an importance matrix and without: the same bytes, several times as fast.
 *
 * Every function takes rows of float32, the moments of their columns or NULL, and the numbers of rows and of columns. A
 * block has 256 weights in sub-blocks of 16 or 32, each with a scale of its own, packed in few bits. When the scales
 * are packed, the weights are rounded anew by what the scales have become.
 *
 * Formulas and layouts: quantize_row_q*_K_ref, without moments, and quantize_row_q*_K_impl, with them, in ggml's
 * ggml-quants.c.
 */
#include "quantize.h"

enum { BLOCK = 256, BLOCKS = CHUNK / BLOCK, SCALES = BLOCK / 16, VECTORS = 2 };

/* Q2_K, Q4_K and Q5_K: x = d scale q - dmin offset */

typedef struct {
    int sub_block, bits, scale_bits;
    float first; /* of the steps of the search without moments; with them they are the same for all types */
    int steps;
    bool absolute;     /* without moments: the error is no square, and a weight's importance its size */
    float factor;      /* of a block's mean square, with moments */
    bool clamped;      /* the scales, with moments */
    int head, at_head; /* where d and dmin are, and where the packed scales */
    int bytes;
} Offset;

static const Offset Q2_K = {16, 2, 4, -0.5f, 15, true, 1.0f, false, 80, 0, 84};
static const Offset Q4_K = {32, 4, 6, -1.0f, 20, false, 2.0f, false, 0, 4, 144};
static const Offset Q5_K = {32, 5, 6, -0.5f, 15, false, 2.0f, true, 0, 4, 176};

/* ggml's make_qp_quants, each lane with numbers of its own, none of them negative: their q and the scale of these */
static inline floats search_positive(const floats *x, const floats *importance, int n, int most, ints *q) {
    floats high = all(0.0f);
    for (int i = 0; i < n; i++) {
        high = chosen(high > x[i], high, x[i]);
    }
    floats best_inverse = (float)most / high, best = all(0.0f);
    for (int try = -5; try <= 4; try++) { /* 0 comes first, in place of -5 */
        if (try == 0) {
            continue;
        }
        const bool first = try == -5;
        const floats inverse = first ? best_inverse : (0.1f * (float)try + (float)most) / high, scale = 1.0f / inverse;
        floats error = all(0.0f);
        for (int i = 0; i < n; i++) {
            const ints rounded = nearest(inverse * x[i]);
            const floats difference = x[i] - scale * floats_of(first ? rounded & 255 : at_most(rounded, most));
            error += importance[i] * difference * difference;
        }
        const ints better = first ? ~(ints){0} : error < best;
        best = chosen(better, error, best);
        best_inverse = chosen(better, inverse, best_inverse);
    }
    floats sum_xq = all(0.0f), sum_qq = all(0.0f);
    for (int i = 0; i < n; i++) {
        const ints rounded = at_most(nearest(best_inverse * x[i]), most);
        const floats at = floats_of(rounded);
        sum_xq += importance[i] * x[i] * at;
        sum_qq += importance[i] * at * at;
        q[i] = rounded & 255;
    }
    descend(x, importance, q, n, 1, INT32_MIN, most, 255, true, &sum_xq, &sum_qq);
    const ints zero = high < 1e-15f;
    for (int i = 0; i < n; i++) {
        q[i] &= ~zero;
    }
    return chosen(~zero & (sum_qq > 0.0f), sum_xq / sum_qq, all(0.0f));
}

/* Scales and offsets of the sub-blocks of a block, each in a byte, and what to multiply them with. */
typedef struct {
    uint8_t scales[SCALES], offsets[SCALES];
    float d, dmin;
} Scales;

/* in proportion to the largest */
static float proportional(const float *found, int n, int most, uint8_t *packed) {
    float largest = 0.0f;
    for (int i = 0; i < n; i++) {
        largest = found[i] > largest ? found[i] : largest;
    }
    const float inverse = largest > 0.0f ? (float)most / largest : 0.0f;
    for (int i = 0; i < n; i++) {
        packed[i] = (uint8_t)nearest_int(inverse * found[i]);
    }
    return largest / (float)most;
}

/* by a search of their own, of all blocks together: a lane has the scales of a block, the next one its offsets */
static inline void search_scales(const Found *found, int n, int most, Scales *packed) {
    floats x[SCALES], importance[SCALES];
    ints q[SCALES];
    for (int i = 0; i < n; i++) {
        x[i] = importance[i] = all(0.0f);
        for (int block = 0; block < BLOCKS; block++) {
            const int at = n * block + i;
            x[i][2 * block] = found->scale[at];
            x[i][2 * block + 1] = found->offset[at];
            importance[i][2 * block] = importance[i][2 * block + 1] = found->importance[at];
        }
    }
    const floats d = search_positive(x, importance, n, most, q);
    for (int block = 0; block < BLOCKS; block++) {
        packed[block].d = d[2 * block];
        packed[block].dmin = d[2 * block + 1];
        for (int i = 0; i < n; i++) {
            packed[block].scales[i] = (uint8_t)q[i][2 * block];
            packed[block].offsets[i] = (uint8_t)q[i][2 * block + 1];
        }
    }
}

/* To the packed scales of a block, and back to what a reader takes them for. */
static inline void pack_scales(Scales *scales, bool six_bits, bool clamp, uint8_t *out) {
    if (!six_bits) {
        for (int i = 0; i < 16; i++) {
            out[i] = (uint8_t)(scales->scales[i] | scales->offsets[i] << 4);
            scales->scales[i] = out[i] & 15;
            scales->offsets[i] = out[i] >> 4;
        }
        return;
    }
    for (int i = 0; i < 8; i++) {
        uint8_t scale = scales->scales[i], offset = scales->offsets[i];
        if (clamp) {
            scale = scale < 63 ? scale : 63;
            offset = offset < 63 ? offset : 63;
        }
        if (i < 4) {
            out[i] = scale;
            out[i + 4] = offset;
        } else {
            out[i + 4] = (uint8_t)((scale & 15) | (offset & 15) << 4);
            out[i - 4] |= (uint8_t)(scale >> 4 << 6);
            out[i] |= (uint8_t)(offset >> 4 << 6);
        }
    }
    for (int i = 0; i < 4; i++) {
        scales->scales[i] = out[i] & 63;
        scales->offsets[i] = out[i + 4] & 63;
        scales->scales[i + 4] = (uint8_t)((out[i + 8] & 15) | out[i] >> 6 << 4);
        scales->offsets[i + 4] = (uint8_t)(out[i + 8] >> 4 | out[i + 4] >> 6 << 4);
    }
}

static inline void quantize_with_offset(const Chunk *chunk, Offset type, void (*write)(uint8_t *, const int32_t *)) {
    const int n = type.sub_block, most = (1 << type.bits) - 1;
    const int scales = BLOCK / n, most_scale = (1 << type.scale_bits) - 1;
    float means[BLOCKS], importance[CHUNK];
    Found found;
    if (chunk->moments) {
        mean_squares(chunk, BLOCK, type.factor, means);
        weigh(chunk, BLOCK, means, importance);
    }
    for (int at = 0; at < CHUNK / n; at += LANES) {
        floats x[SUB_BLOCK], w[SUB_BLOCK];
        load(chunk->x + n * at, n, x);
        if (chunk->moments) {
            load(importance + n * at, n, w);
            search_with_offset(x, w, n, most, -0.9f, 0.05f, 36, false, &found, at);
            continue;
        }
        floats mean = all(0.0f);
        if (!type.absolute) {
            for (int i = 0; i < n; i++) {
                mean += x[i] * x[i];
            }
            mean = root_of(mean / (float)n);
        }
        for (int i = 0; i < n; i++) {
            w[i] = mean + size_of(x[i]);
        }
        search_with_offset(x, w, n, most, type.first, 0.1f, type.steps, type.absolute, &found, at);
    }

    Scales packed[BLOCKS];
    if (chunk->moments) {
        search_scales(&found, scales, most_scale, packed);
    }
    uint8_t *out = chunk->out;
    for (int block = 0; block < chunk->blocks; block++, out += type.bytes) {
        Scales *own = packed + block;
        const int at = scales * block;
        if (!chunk->moments) {
            own->d = proportional(found.scale + at, scales, most_scale, own->scales);
            own->dmin = proportional(found.offset + at, scales, most_scale, own->offsets);
        }
        pack_scales(own, type.scale_bits == 6, type.clamped || !chunk->moments, out + type.at_head);
        const float d = write_half(out + type.head, own->d), dmin = write_half(out + type.head + 2, own->dmin);
        int32_t q[BLOCK];
        for (int i = 0; i < scales; i++) {
            const float *x = chunk->x + n * (at + i);
            const float scale = d * (float)own->scales[i];
            if (scale == 0.0f) {
                round_as_found(&found, at + i, x, n, 0, most, q + n * i);
            } else {
                round_by(scale, dmin * (float)own->offsets[i], x, n, 0, most, q + n * i);
            }
        }
        write(out, q);
    }
}

/* two bits of each of 256 weights */
static inline void write_two_bits(uint8_t *out, const int32_t *q) {
    for (int half = 0; half < 2; half++, q += 128, out += 32) {
        for (int i = 0; i < 32; i++) {
            out[i] = (uint8_t)((q[i] & 3) | (q[i + 32] & 3) << 2 | (q[i + 64] & 3) << 4 | (q[i + 96] & 3) << 6);
        }
    }
}

/* 84 bytes: scales[16] qs[64] d[2] dmin[2] */
static inline void write_q2_k(uint8_t *out, const int32_t *q) { write_two_bits(out + 16, q); }

/* 144 bytes: d[2] dmin[2] scales[12] qs[128] */
static inline void write_q4_k(uint8_t *out, const int32_t *q) {
    uint8_t *qs = out + 16;
    for (int pair = 0; pair < 4; pair++, q += 64, qs += 32) {
        for (int i = 0; i < 32; i++) {
            qs[i] = (uint8_t)(q[i] | q[i + 32] << 4);
        }
    }
}

/* 176 bytes: d[2] dmin[2] scales[12] qh[32] qs[128] */
static inline void write_q5_k(uint8_t *out, const int32_t *q) {
    uint8_t *qh = out + 16, *qs = out + 48;
    memset(qh, 0, 32);
    for (int pair = 0; pair < 4; pair++, q += 64, qs += 32) {
        for (int i = 0; i < 32; i++) {
            qs[i] = (uint8_t)((q[i] & 15) | (q[i + 32] & 15) << 4);
            qh[i] |= (uint8_t)((q[i] >> 4 | q[i + 32] >> 4 << 1) << 2 * pair);
        }
    }
}

static void chunk_q2_k(const Chunk *chunk) { quantize_with_offset(chunk, Q2_K, write_q2_k); }
static void chunk_q4_k(const Chunk *chunk) { quantize_with_offset(chunk, Q4_K, write_q4_k); }
static void chunk_q5_k(const Chunk *chunk) { quantize_with_offset(chunk, Q5_K, write_q5_k); }

QUANTIZER(q2_k, BLOCK, 84, false)
QUANTIZER(q4_k, BLOCK, 144, false)
QUANTIZER(q5_k, BLOCK, 176, false)

/* Q3_K and Q6_K: x = d scale (q - most) */

/* ggml's make_q3_quants, of VECTORS vectors of sub-blocks */
static inline void search_by_descent(const float *from, int n, int most, Found *found, int at, int32_t *q) {
    floats x[VECTORS * SUB_BLOCK], importance[VECTORS * SUB_BLOCK], sum_xq[VECTORS], sum_qq[VECTORS], size[VECTORS];
    ints lanes[VECTORS * SUB_BLOCK];
    for (int vector = 0; vector < VECTORS; vector++) {
        floats own[SUB_BLOCK], outermost = all(0.0f);
        load(from + n * LANES * vector, n, own);
        size[vector] = sum_xq[vector] = sum_qq[vector] = all(0.0f);
        for (int i = 0; i < n; i++) {
            const ints greater = size_of(own[i]) > size[vector];
            size[vector] = chosen(greater, size_of(own[i]), size[vector]);
            outermost = chosen(greater, own[i], outermost);
        }
        const floats inverse = -(float)most / outermost;
        for (int i = 0; i < n; i++) {
            const int place = VECTORS * i + vector;
            x[place] = own[i];
            importance[place] = own[i] * own[i];
            lanes[place] = clamped(nearest(inverse * own[i]), -most, most - 1);
            const floats to = floats_of(lanes[place]);
            sum_xq[vector] += importance[place] * own[i] * to;
            sum_qq[vector] += importance[place] * to * to;
        }
    }
    descend(x, importance, lanes, n, VECTORS, -most, most - 1, -1, false, sum_xq, sum_qq);
    for (int vector = 0; vector < VECTORS; vector++, at += LANES) {
        const ints zero = size[vector] < 1e-15f, positive = sum_qq[vector] > 0.0f;
        store(found->scale + at, chosen(~zero & positive, sum_xq[vector] / sum_qq[vector], all(0.0f)));
        for (int i = 0; i < n; i++) {
            int32_t stored[LANES];
            store_ints(stored, ~zero & (lanes[VECTORS * i + vector] + most));
            for (int lane = 0; lane < LANES; lane++) {
                q[n * (at + lane) + i] = stored[lane];
            }
        }
    }
}

/* The scales of the blocks by a search of their own, a block in each lane. */
static inline void search_symmetric_scales(const Found *found, int most, Found *of_scales) {
    floats x[SCALES], importance[SCALES];
    for (int i = 0; i < SCALES; i++) {
        x[i] = importance[i] = all(0.0f);
        for (int block = 0; block < BLOCKS; block++) {
            x[i][block] = found->scale[SCALES * block + i];
            importance[i][block] = found->importance[SCALES * block + i];
        }
    }
    search_symmetric(x, importance, SCALES, most, of_scales, 0);
}

/* 110 bytes: hmask[32] qs[64] scales[12] d[2]; hmask has the third bit of q */
static void chunk_q3_k(const Chunk *chunk) {
    float means[BLOCKS], importance[CHUNK];
    int32_t q[CHUNK];
    Found found, of_scales;
    if (chunk->moments) {
        mean_squares(chunk, BLOCK, 2.0f, means);
        weigh(chunk, BLOCK, means, importance);
    }
    for (int at = 0; at < SUB_BLOCKS && !chunk->moments; at += VECTORS * LANES) {
        search_by_descent(chunk->x + 16 * at, 16, 4, &found, at, q);
    }
    for (int at = 0; at < SUB_BLOCKS && chunk->moments; at += LANES) {
        floats x[SUB_BLOCK], w[SUB_BLOCK];
        load(chunk->x + 16 * at, 16, x);
        load(importance + 16 * at, 16, w);
        search_symmetric(x, w, 16, 4, &found, at);
    }
    if (chunk->moments) {
        search_symmetric_scales(&found, 32, &of_scales);
    }

    uint8_t *out = chunk->out;
    for (int block = 0; block < chunk->blocks; block++, out += 110) {
        const float *own = found.scale + SCALES * block;
        int32_t scales[SCALES] = {0};
        float d;
        if (chunk->moments) {
            d = of_scales.scale[block];
            round_as_found(&of_scales, block, own, SCALES, -32, 31, scales);
        } else {
            const float outermost = outermost_of(own, SCALES), inverse = -32.0f / outermost;
            d = outermost == 0.0f ? 0.0f : 1.0f / inverse;
            for (int i = 0; i < SCALES && outermost != 0.0f; i++) {
                scales[i] = clamped_int((int8_t)nearest_int(inverse * own[i]), -32, 31) + 32;
            }
        }
        uint8_t *packed = out + 96;
        memset(packed + 8, 0, 4);
        for (int i = 0; i < 8; i++) {
            packed[i] = (uint8_t)((scales[i] & 15) | (scales[i + 8] & 15) << 4);
        }
        for (int i = 0; i < SCALES; i++) {
            packed[8 + i % 4] |= (uint8_t)(scales[i] >> 4 << 2 * (i / 4));
        }
        d = write_half(out + 108, d);

        int32_t *own_q = q + BLOCK * block;
        for (int i = 0; i < SCALES; i++) {
            const float *x = chunk->x + BLOCK * block + 16 * i;
            const float scale = d * (float)(scales[i] - 32);
            if (scale != 0.0f) {
                round_by(scale, 0.0f, x, 16, -4, 3, own_q + 16 * i);
            } else if (chunk->moments) {
                round_as_found(&found, SCALES * block + i, x, 16, -4, 3, own_q + 16 * i);
            }
        }
        for (int i = 0; i < 32; i++) {
            int high = 0;
            for (int bit = 0; bit < 8; bit++) {
                high |= own_q[32 * bit + i] >> 2 << bit;
            }
            out[i] = (uint8_t)high;
        }
        write_two_bits(out + 32, own_q);
    }
}

QUANTIZER(q3_k, BLOCK, 110, false)

/* 210 bytes: ql[128] qh[64] scales[16] d[2] */
static void chunk_q6_k(const Chunk *chunk) {
    Found found;
    for (int at = 0; at < CHUNK / 16; at += LANES) {
        floats x[SUB_BLOCK], w[SUB_BLOCK];
        load(chunk->x + 16 * at, 16, x);
        if (chunk->moments) {
            load(chunk->moments + 16 * at, 16, w);
        } else {
            for (int i = 0; i < 16; i++) {
                w[i] = x[i] * x[i];
            }
        }
        search_symmetric(x, w, 16, 32, &found, at);
    }

    uint8_t *out = chunk->out;
    for (int block = 0; block < chunk->blocks; block++, out += 210) {
        const float *own = found.scale + SCALES * block;
        const float outermost = outermost_of(own, SCALES), inverse = -128.0f / outermost;
        if (fabsf(outermost) < 1e-15f) {
            memset(out, 0, 210);
            continue;
        }
        const float d = write_half(out + 208, 1.0f / inverse);
        int32_t q[BLOCK];
        for (int i = 0; i < SCALES; i++) {
            const float *x = chunk->x + BLOCK * block + 16 * i;
            const int nearest = nearest_int(inverse * own[i]);
            const int8_t packed = (int8_t)(nearest < 127 ? nearest : 127);
            out[192 + i] = (uint8_t)packed;
            const float scale = d * (float)packed;
            if (scale != 0.0f) {
                round_by(scale, 0.0f, x, 16, -32, 31, q + 16 * i);
            } else {
                round_as_found(&found, SCALES * block + i, x, 16, -32, 31, q + 16 * i);
            }
        }
        for (int half = 0; half < 2; half++) {
            const int32_t *from = q + 128 * half;
            uint8_t *ql = out + 64 * half, *qh = out + 128 + 32 * half;
            for (int i = 0; i < 64; i++) {
                ql[i] = (uint8_t)((from[i] & 15) | (from[i + 64] & 15) << 4);
            }
            for (int i = 0; i < 32; i++) {
                const int high = from[i] >> 4 | from[i + 32] >> 4 << 2;
                qh[i] = (uint8_t)(high | from[i + 64] >> 4 << 4 | from[i + 96] >> 4 << 6);
            }
        }
    }
}

QUANTIZER(q6_k, BLOCK, 210, false)
