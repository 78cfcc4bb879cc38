/*
 * Tokens, as they are, times panels of rows, in float32 or bfloat16, on one core of an x86 processor: LANES is defined
 * where there are vectors for it. A panel has the first word of each of its rows, then the next of each. A word, of 32
 * bits, is a float32 or a pair of bfloat16, which the processor multiplies and adds at once: so the same code multiplies
 * both.
 *
 * A sum is taken in the order of the words, from zero on; a multiply-add is not rounded in between. So its bits depend
 * neither on the other tokens and rows, nor on how wide the vectors are.
 */
#include "transpose.h"

#if defined(__AVX512F__)
#define LANES 16
#define TOKENS 8 /* at a time, with VECTORS of rows: the registers hold their sums */
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#define TOKENS 4
#endif

#if defined(LANES)
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

enum { VECTORS = 3, PANEL = VECTORS * LANES }; /* of rows */

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));

INLINE Floats multiply_add(Floats sums, Words x, Words y, int bfloat16) {
#if defined(__AVX512BF16__) && LANES == 16
    if (bfloat16) {
        return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)x, (__m512bh)y);
    }
#endif
#if LANES == 16
    return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sums);
#else
    return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sums);
#endif
}

/*
 * So many tokens, which are `apart` bytes apart, times a panel's first vectors of rows, PANEL sums for each token. With
 * `add` they are added to those that are there.
 */
INLINE void multiply_few(const int tokens, const int vectors, const uint8_t *x, int64_t apart,
                         const int32_t *restrict weights, int64_t words, float *restrict out, int add, int bfloat16) {
    const uint8_t *x_4 = x + (tokens > 4 ? 4 * apart : 0); /* two addresses that move, and not one for each token */
    Floats sums[TOKENS][VECTORS];
    UNROLLED
    for (int i = 0; i < tokens; i++) {
        UNROLLED
        for (int j = 0; j < vectors; j++) {
            __builtin_prefetch(out + i * PANEL + LANES * j, 1);
            sums[i][j] = (Floats){0};
        }
    }
    for (int64_t k = 0; k < words; k++, x += 4, x_4 += 4, weights += PANEL) {
        Words w[VECTORS];
        UNROLLED
        for (int j = 0; j < vectors; j++) {
            memcpy(&w[j], weights + LANES * j, sizeof w[j]);
            __asm__("" : "+v"(w[j])); /* stays in its register: gcc would load it again for each token */
        }
        UNROLLED
        for (int i = 0; i < tokens; i++) {
            int32_t word;
            memcpy(&word, (i < 4 ? x : x_4) + i % 4 * apart, 4);
            const Words token = word - (Words){0};
            UNROLLED
            for (int j = 0; j < vectors; j++) {
                sums[i][j] = multiply_add(sums[i][j], token, w[j], bfloat16);
            }
        }
    }
    UNROLLED
    for (int i = 0; i < tokens; i++) {
        UNROLLED
        for (int j = 0; j < vectors; j++) {
            float *at = out + i * PANEL + LANES * j;
            if (add) {
                Floats before;
                memcpy(&before, at, sizeof before);
                sums[i][j] += before;
            }
            memcpy(at, &sums[i][j], sizeof sums[i][j]);
        }
    }
}

/* the same of SIDE tokens or fewer */
INLINE void multiply_panel(int64_t tokens, const int vectors, const uint8_t *x, int64_t apart, const int32_t *weights,
                           int64_t words, float *out, int add, int bfloat16) {
#define CASE(n)                                                                                                        \
    case n:                                                                                                            \
        multiply_few(n, vectors, x, apart, weights, words, out, add, bfloat16);                                        \
        break
    for (; tokens > TOKENS; tokens -= TOKENS, x += TOKENS * apart, out += TOKENS * PANEL) {
        multiply_few(TOKENS, vectors, x, apart, weights, words, out, add, bfloat16);
    }
    switch (tokens) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
#if TOKENS == 8
        CASE(5);
        CASE(6);
        CASE(7);
        CASE(8);
#endif
    }
#undef CASE
}

/* n sums, at most a panel's, as they are returned */
INLINE void write_sums(const float *sums, int64_t n, uint8_t *out, int bfloat16) {
    if (!bfloat16) {
        memcpy(out, sums, 4 * (size_t)n);
        return;
    }
#if defined(__AVX512BF16__) && LANES == 16
    for (int64_t i = 0; i < n; i += LANES) {
        const __mmask16 here = n - i < LANES ? (__mmask16)((1u << (n - i)) - 1) : 0xffff;
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums + i));
        _mm256_mask_storeu_epi16(out + 2 * i, here, rounded);
    }
#endif
}

INLINE int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

INLINE int64_t panels_of(int64_t rows) {
    return (rows + PANEL - 1) / PANEL;
}
#endif
