/*
 * The types whose loops compilers do not vectorise in libgguf, two to five times as fast, with the same bits.
 *
 * Layouts and formulas are those of block_* and dequantize_row_* in ggml's ggml-common.h and ggml-quants.c. Every
 * function takes packed blocks, 32 or 256 float32 for each, and the number of blocks.
 */
#include "native.h"

/* 22 bytes, 32 weights: d[2] qh[4] qs[16]; x = d (q - 16) */
API void dequantize_q5_0(const uint8_t *restrict packed, float *restrict out, int64_t blocks) {
    for (int64_t block = 0; block < blocks; block++, packed += 22, out += 32) {
        const float d = half_at(packed);
        uint32_t qh;
        memcpy(&qh, packed + 2, 4);
        const uint8_t *qs = packed + 6;
        for (int i = 0; i < 16; i++) {
            const int low = (qs[i] & 15) | (int)((qh >> i & 1) << 4);
            const int high = qs[i] >> 4 | (int)((qh >> (i + 16) & 1) << 4);
            out[i] = (float)(low - 16) * d;
            out[i + 16] = (float)(high - 16) * d;
        }
    }
}

/* 24 bytes, 32 weights: d[2] m[2] qh[4] qs[16]; x = d q + m */
API void dequantize_q5_1(const uint8_t *restrict packed, float *restrict out, int64_t blocks) {
    for (int64_t block = 0; block < blocks; block++, packed += 24, out += 32) {
        const float d = half_at(packed), m = half_at(packed + 2);
        uint32_t qh;
        memcpy(&qh, packed + 4, 4);
        const uint8_t *qs = packed + 8;
        for (int i = 0; i < 16; i++) {
            const int low = (qs[i] & 15) | (int)((qh >> i & 1) << 4);
            const int high = qs[i] >> 4 | (int)((qh >> (i + 16) & 1) << 4);
            out[i] = (float)low * d + m;
            out[i + 16] = (float)high * d + m;
        }
    }
}

/* 210 bytes, 256 weights: ql[128] qh[64] scales[16] d[2]; x = d scale (q - 32) */
API void dequantize_q6_k(const uint8_t *restrict packed, float *restrict out, int64_t blocks) {
    for (int64_t block = 0; block < blocks; block++, packed += 210) {
        const float d = half_at(packed + 208);
        for (int half = 0; half < 2; half++, out += 128) {
            const uint8_t *ql = packed + 64 * half, *qh = packed + 128 + 32 * half;
            float scale[8];
            for (int i = 0; i < 8; i++) {
                scale[i] = d * (float)(int8_t)packed[192 + 8 * half + i];
            }
            for (int part = 0; part < 2; part++) {
                for (int i = 16 * part; i < 16 * part + 16; i++) {
                    out[i] = scale[part] * (float)(((ql[i] & 15) | (qh[i] & 3) << 4) - 32);
                    out[i + 32] = scale[part + 2] * (float)(((ql[i + 32] & 15) | (qh[i] >> 2 & 3) << 4) - 32);
                    out[i + 64] = scale[part + 4] * (float)((ql[i] >> 4 | (qh[i] >> 4 & 3) << 4) - 32);
                    out[i + 96] = scale[part + 6] * (float)((ql[i + 32] >> 4 | (qh[i] >> 6) << 4) - 32);
                }
            }
        }
    }
}

static const int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static inline void dequantize_iq4(const uint8_t *restrict qs, float *restrict out, float d) {
    float values[16];
    for (int i = 0; i < 16; i++) {
        values[i] = d * (float)IQ4_VALUES[i];
    }
    for (int i = 0; i < 16; i++) {
        out[i] = values[qs[i] & 15];
        out[i + 16] = values[qs[i] >> 4];
    }
}

/* 18 bytes, 32 weights: d[2] qs[16]; x = d value[q] */
API void dequantize_iq4_nl(const uint8_t *restrict packed, float *restrict out, int64_t blocks) {
    for (int64_t block = 0; block < blocks; block++, packed += 18, out += 32) {
        dequantize_iq4(packed + 2, out, half_at(packed));
    }
}

/* 136 bytes, 256 weights: d[2] scales_h[2] scales_l[4] qs[128]; x = d (scale - 32) value[q] */
API void dequantize_iq4_xs(const uint8_t *restrict packed, float *restrict out, int64_t blocks) {
    for (int64_t block = 0; block < blocks; block++, packed += 136) {
        const float d = half_at(packed);
        uint16_t high;
        memcpy(&high, packed + 2, 2);
        for (int part = 0; part < 8; part++, out += 32) {
            const int low = packed[4 + part / 2] >> 4 * (part % 2) & 15;
            const int scale = low | (high >> 2 * part & 3) << 4;
            dequantize_iq4(packed + 8 + 16 * part, out, d * (float)(scale - 32));
        }
    }
}
