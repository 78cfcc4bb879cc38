/*
 * The k-quants: 256 weights in groups of 16 or 32, with a small integer scale each.
 *
 * Every function takes packed blocks, 256 numbers for each, and the number of blocks.
 */
#include "dequantize.h"

/* 84 bytes: scales[16] qs[64] d[2] dmin[2]; x = (d s) q - dmin m, groups of 16 */
INLINE void unpack_q2_k(const uint8_t *restrict block, void *restrict out, enum format format) {
    const float d = scale_at(block + 80), dmin = scale_at(block + 82);
    UNROLLED
    for (int i = 0; i < 16; i++) {
        const Bytes qs = bytes_at(block + 16 + 32 * (i / 8) + 16 * (i % 2));
        const float scale = d * (float)(block[i] & 15), minimum = dmin * (float)(block[i] >> 4);
        put(out, 16 * i, plus(times(floats_of((SignedBytes)(qs >> 2 * (i / 2 % 4) & 3)), scale), -minimum), format);
    }
}
DEQUANTIZERS(q2_k, 84, 256)

/* 110 bytes: hmask[32] qs[64] scales[12] d[2]; x = d (s - 32) (q - 4), groups of 16 */
INLINE void unpack_q3_k(const uint8_t *restrict block, void *restrict out, enum format format) {
    const uint32_t scales[3] = {word_at(block + 96), word_at(block + 100), word_at(block + 104)};
    const Words low = {scales[0], scales[1], scales[0] >> 4, scales[1] >> 4};
    const Words high = {scales[2] << 4, scales[2] << 2, scales[2], scales[2] >> 2};
    const SignedBytes s = (SignedBytes)((low & 0x0f0f0f0f) | (high & 0x30303030)) - 32;
    float scale[16];
    put(scale, 0, times(floats_of(s), scale_at(block + 108)), FLOAT32);
    UNROLLED
    for (int i = 0; i < 16; i++) {
        const Bytes qs = bytes_at(block + 32 + 32 * (i / 8) + 16 * (i % 2)), hmask = bytes_at(block + 16 * (i % 2));
        const Bytes q = (qs >> 2 * (i / 2 % 4) & 3) | (hmask >> i / 2 & 1) << 2;
        put(out, 16 * i, times(floats_of((SignedBytes)q - 4), scale[i]), format);
    }
}
DEQUANTIZERS(q3_k, 110, 256)

/* s and m of a group of Q4_K and Q5_K, of 6 bits, from their 12 bytes */
INLINE float scale_of(const uint8_t *scales, int group) {
    return (float)(group < 4 ? scales[group] & 63 : (scales[group + 4] & 15) | scales[group - 4] >> 6 << 4);
}

INLINE float minimum_of(const uint8_t *scales, int group) {
    return (float)(group < 4 ? scales[group + 4] & 63 : scales[group + 4] >> 4 | scales[group] >> 6 << 4);
}

/* 144 bytes: d[2] dmin[2] scales[12] qs[128]; x = (d s) q - dmin m, groups of 32 */
INLINE void unpack_q4_k(const uint8_t *restrict block, void *restrict out, enum format format) {
    const float d = scale_at(block), dmin = scale_at(block + 2);
    UNROLLED
    for (int i = 0; i < 16; i++) {
        const Bytes qs = bytes_at(block + 16 + 32 * (i / 4) + 16 * (i % 2)), q = i / 2 % 2 ? qs >> 4 : qs & 15;
        const float scale = d * scale_of(block + 4, i / 2), minimum = dmin * minimum_of(block + 4, i / 2);
        put(out, 16 * i, plus(times(floats_of((SignedBytes)q), scale), -minimum), format);
    }
}
DEQUANTIZERS(q4_k, 144, 256)

/* 176 bytes: d[2] dmin[2] scales[12] qh[32] qs[128]; x = (d s) q - dmin m, groups of 32 */
INLINE void unpack_q5_k(const uint8_t *restrict block, void *restrict out, enum format format) {
    const float d = scale_at(block), dmin = scale_at(block + 2);
    UNROLLED
    for (int i = 0; i < 16; i++) {
        const Bytes qs = bytes_at(block + 48 + 32 * (i / 4) + 16 * (i % 2)), qh = bytes_at(block + 16 + 16 * (i % 2));
        const Bytes q = (i / 2 % 2 ? qs >> 4 : qs & 15) | (qh >> i / 2 & 1) << 4;
        const float scale = d * scale_of(block + 4, i / 2), minimum = dmin * minimum_of(block + 4, i / 2);
        put(out, 16 * i, plus(times(floats_of((SignedBytes)q), scale), -minimum), format);
    }
}
DEQUANTIZERS(q5_k, 176, 256)

/* 210 bytes: ql[128] qh[64] scales[16] d[2]; x = d s (q - 32), groups of 16 */
INLINE void unpack_q6_k(const uint8_t *restrict block, void *restrict out, enum format format) {
    float scale[16];
    put(scale, 0, times(floats_of((SignedBytes)bytes_at(block + 192)), scale_at(block + 208)), FLOAT32);
    UNROLLED
    for (int i = 0; i < 16; i++) {
        const Bytes ql = bytes_at(block + 64 * (i / 8) + 16 * (i % 4)), low = i / 4 % 2 ? ql >> 4 : ql & 15;
        const Bytes qh = bytes_at(block + 128 + 32 * (i / 8) + 16 * (i % 2));
        const SignedBytes q = (SignedBytes)(low | (qh >> 2 * (i / 2 % 4) & 3) << 4) - 32;
        put(out, 16 * i, times(floats_of(q), scale[i]), format);
    }
}
DEQUANTIZERS(q6_k, 210, 256)
