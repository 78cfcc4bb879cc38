/*
 * IQ1, IQ2 and IQ3: 256 weights in runs of eight or four, each an entry of a grid.
 *
 * Every function takes packed blocks, 256 numbers for each, the number of blocks, and the grid: int8, four weights an
 * entry for IQ3, eight for the others.
 */
#include "dequantize.h"

/* two entries of eight */
INLINE Floats eights(const int8_t *grid, uint32_t first, uint32_t second) {
    return floats_of_halves(long_at(grid + 8 * first), long_at(grid + 8 * second));
}

/* two entries of four */
INLINE uint64_t two_fours(const int8_t *grid, uint32_t first, uint32_t second) {
    return word_at((const uint8_t *)grid + 4 * first) | (uint64_t)word_at((const uint8_t *)grid + 4 * second) << 32;
}

/* four times 7 bits of signs as bytes, whose eighth bit makes the number of set ones even */
INLINE uint32_t even_signs(uint32_t word) {
    const uint32_t s = (word & 0x7f) | (word << 1 & 0x7f00) | (word << 2 & 0x7f0000) | (word << 3 & 0x7f000000);
    const uint32_t four = s ^ (s >> 4 & 0x0f0f0f0f), two = four ^ four >> 2, parity = two ^ two >> 1;
    return s | (parity & 0x01010101) << 7;
}

/* 66 bytes: d[2], then for 32 weights index[4] and 32 bits: 4 × 7 of signs, s; x = d (s + 1/2) / 4 · ±g */
INLINE void unpack_iq2_xxs(const uint8_t *block, void *restrict out, enum format format, const int8_t *grid) {
    const float d = scale_at(block);
    UNROLLED
    for (int i = 0; i < 8; i++) {
        const uint8_t *qs = block + 2 + 8 * i;
        const uint32_t word = word_at(qs + 4), signs = even_signs(word);
        const float scale = d * (0.5f + (float)(int)(word >> 28)) * 0.25f;
        put(out, 32 * i, times(with_signs(eights(grid, qs[0], qs[1]), signs), scale), format);
        put(out, 32 * i + 16, times(with_signs(eights(grid, qs[2], qs[3]), signs >> 16), scale), format);
    }
}
GRID_DEQUANTIZERS(iq2_xxs, 66)

/* 74 bytes: d[2], 16 bits for 8 weights: 9 of index, 7 of signs; scales[8]; x = d (s + 1/2) / 4 · ±g, groups of 16 */
INLINE void unpack_iq2_xs(const uint8_t *block, void *restrict out, enum format format, const int8_t *grid) {
    const float d = scale_at(block);
    UNROLLED
    for (int i = 0; i < 16; i++) {
        const uint32_t word = word_at(block + 2 + 4 * i), s = block[66 + i / 2] >> 4 * (i % 2) & 15;
        const uint32_t signs = even_signs((word >> 9 & 127) | (word >> 25) << 7);
        const Floats g = eights(grid, word & 511, word >> 16 & 511);
        put(out, 16 * i, times(with_signs(g, signs), d * (0.5f + (float)(int)s) * 0.25f), format);
    }
}
GRID_DEQUANTIZERS(iq2_xs, 74)

/* 82 bytes: d[2] qs[32] signs[32] qh[8] scales[8]; x = d (s + 1/2) / 4 · ±g, groups of 16 */
INLINE void unpack_iq2_s(const uint8_t *block, void *restrict out, enum format format, const int8_t *grid) {
    const float d = scale_at(block);
    UNROLLED
    for (int i = 0; i < 16; i++) {
        const uint32_t s = block[74 + i / 2] >> 4 * (i % 2) & 15, qh = block[66 + i / 2] >> 4 * (i % 2);
        const Floats g = eights(grid, block[2 + 2 * i] | (qh & 3) << 8, block[3 + 2 * i] | (qh >> 2 & 3) << 8);
        const float scale = d * (0.5f + (float)(int)s) * 0.25f;
        put(out, 16 * i, times(with_signs(g, half_word_at(block + 34 + 2 * i)), scale), format);
    }
}
GRID_DEQUANTIZERS(iq2_s, 82)

/* 98 bytes: d[2] qs[64], then for 32 weights 32 bits as in IQ2_XXS; x = d (s + 1/2) / 2 · ±g */
INLINE void unpack_iq3_xxs(const uint8_t *block, void *restrict out, enum format format, const int8_t *grid) {
    const float d = scale_at(block);
    UNROLLED
    for (int i = 0; i < 16; i++) {
        const uint8_t *qs = block + 2 + 4 * i;
        const uint32_t word = word_at(block + 66 + 4 * (i / 2)), signs = even_signs(word);
        const Floats g = floats_of_halves(two_fours(grid, qs[0], qs[1]), two_fours(grid, qs[2], qs[3]));
        const float scale = d * (0.5f + (float)(int)(word >> 28)) * 0.5f;
        put(out, 16 * i, times(with_signs(g, signs >> 16 * (i % 2)), scale), format);
    }
}
GRID_DEQUANTIZERS(iq3_xxs, 98)

/* 110 bytes: d[2] qs[64] qh[8] signs[32] scales[4]; x = d (2 s + 1) · ±g, groups of 32 */
INLINE void unpack_iq3_s(const uint8_t *block, void *restrict out, enum format format, const int8_t *grid) {
    const float d = scale_at(block);
    UNROLLED
    for (int i = 0; i < 16; i++) {
        const uint8_t *qs = block + 2 + 4 * i;
        const uint32_t qh = (uint32_t)block[66 + i / 2] >> 4 * (i % 2);
        const uint64_t low = two_fours(grid, qs[0] | (qh << 8 & 256), qs[1] | (qh << 7 & 256));
        const uint64_t high = two_fours(grid, qs[2] | (qh << 6 & 256), qs[3] | (qh << 5 & 256));
        const float scale = d * (float)(1 + 2 * (block[106 + i / 4] >> 4 * (i / 2 % 2) & 15));
        const uint32_t signs = half_word_at(block + 74 + 2 * i);
        put(out, 16 * i, times(with_signs(floats_of_halves(low, high), signs), scale), format);
    }
}
GRID_DEQUANTIZERS(iq3_s, 110)

/* eight times two entries, each an eighth up, or down where its bit of two is set */
INLINE Floats moved(const int8_t *grid, uint32_t first, uint32_t second, uint32_t down) {
    Floats x = times(eights(grid, first, second), 8.0f);
    UNROLLED
    for (int i = 0; i < PARTS; i++) {
        x.part[i] += float_of_bits(0x3f800000 | (down >> (2 * i / PARTS) & 1) << 31);
    }
    return x;
}

/* 50 bytes: d[2] qs[32], 16 bits for 32 weights: 4 × 3 of index, s, sign; x = d (2 s + 1) (g ± 1/8) */
INLINE void unpack_iq1_s(const uint8_t *block, void *restrict out, enum format format, const int8_t *grid) {
    const float d = scale_at(block);
    UNROLLED
    for (int i = 0; i < 16; i++) {
        const uint32_t qh = half_word_at(block + 34 + 2 * (i / 2)), high = qh >> 6 * (i % 2);
        const uint32_t first = block[2 + 2 * i] | (high & 7) << 8, second = block[3 + 2 * i] | (high >> 3 & 7) << 8;
        const float scale = d * (float)(int)(2 * (qh >> 12 & 7) + 1) * 0.125f;
        put(out, 16 * i, times(moved(grid, first, second, (qh >> 15) * 3), scale), format);
    }
}
GRID_DEQUANTIZERS(iq1_s, 50)

/* 56 bytes: qs[32] qh[16] scales[8], 4 bits of qh for 8 weights: 3 of index, sign; x = d (2 s + 1) (g ± 1/8) */
INLINE void unpack_iq1_m(const uint8_t *block, void *restrict out, enum format format, const int8_t *grid) {
    const uint8_t *scales = block + 48;
    const uint8_t d_bytes[2] = {scales[1] >> 4 | (scales[3] & 0xf0), scales[5] >> 4 | (scales[7] & 0xf0)};
    const float d = scale_at(d_bytes);
    UNROLLED
    for (int i = 0; i < 16; i++) {
        const uint32_t qh = block[32 + i], s = half_word_at(scales + 2 * (i / 4)) >> 3 * (i % 4) & 7;
        const uint32_t first = block[2 * i] | (qh & 7) << 8, second = block[2 * i + 1] | (qh >> 4 & 7) << 8;
        const float scale = d * (float)(int)(2 * s + 1) * 0.125f;
        put(out, 16 * i, times(moved(grid, first, second, (qh >> 3 & 1) | (qh >> 6 & 2)), scale), format);
    }
}
GRID_DEQUANTIZERS(iq1_m, 56)
