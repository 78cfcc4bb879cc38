/*
 * Attention, softmax(scale * q k') v, in float32 or bfloat16, on one core of an x86 processor.
 *
 * The keys of a head are laid out as the rows of a product, its values as the columns of another. For a few queries at
 * a time all scores are kept, where the second cache holds them, so that none is computed twice:
 *
 *     for each panel of keys, for each 8 of the queries        their scores
 *     for each 8 of the queries                                their probabilities, not yet divided by their sum
 *     for each part of the keys, for each panel of values, for each 8 of the queries      their sums
 *
 * Scores, their exponentials and all sums are float32; probabilities are rounded to bfloat16 where values are. The bits
 * of a query's depend neither on the other queries, nor on how wide the vectors are.
 */
#include "panels.h"

#if defined(LANES)
enum { QUERIES = 32 }; /* at a time: whole SIDEs */
enum { DEPTH = 256 };  /* words of a part of the keys */

typedef float Eight __attribute__((vector_size(32)));
typedef int32_t EightWords __attribute__((vector_size(32)));

/*
 * e to the power of numbers that are at most 0, to 1e-7 of it, and 0 below -87. After Cephes' expf: of 2 to the power of
 * a whole number, and a polynomial of what remains, which is within ln(2) / 2 of 0.
 */
INLINE Eight exponential(Eight x) {
    const Eight shift = (Eight){0} + 0x1.8p23f; /* the bits of what it is added to are a whole number */
    const EightWords too_small = x < -87.0f;
    const Eight shifted = x * 0x1.715476p0f + shift, whole = shifted - shift;
    const Eight rest = x - whole * 0x1.63p-1f - whole * -0x1.bd0106p-13f;
    Eight sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const Eight power = (Eight)(((EightWords)shifted - (EightWords)shift + 127) << 23);
    return (Eight)((EightWords)(sum * power) & ~too_small);
}

INLINE Eight eight_at(const float *at) {
    Eight x;
    memcpy(&x, at, sizeof x);
    return x;
}

/* a panel of keys' scores of a query as their probabilities, whose sums are added to */
INLINE Eight exponentials(const float *scores, float most, float scale, Eight sums, uint8_t *restrict out,
                          int bfloat16) {
    float probabilities[PANEL];
    for (int j = 0; j < PANEL; j += 8) {
        const Eight x = exponential((eight_at(scores + j) - most) * scale);
        sums += x;
        memcpy(probabilities + j, &x, sizeof x);
    }
    write_sums(probabilities, PANEL, out, bfloat16);
    return sums;
}

INLINE Eight larger(Eight x, Eight y) {
    const EightWords is_less = x < y;
    return (Eight)(((EightWords)y & is_less) | ((EightWords)x & ~is_less));
}

INLINE float largest(Eight x) {
    float most = x[0];
    for (int i = 1; i < 8; i++) {
        most = most < x[i] ? x[i] : most;
    }
    return most;
}

INLINE float sum_of(Eight x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

INLINE void attend_to(const uint8_t *queries, int64_t apart, int64_t n, const int32_t *keys, const int32_t *values,
                      int64_t n_keys, int64_t columns, float scale, uint8_t *out, int64_t out_bytes, int32_t *scratch,
                      int bfloat16) {
    const int64_t in_word = bfloat16 ? 2 : 1, words = columns / in_word, panels = panels_of(n_keys);
    const int64_t key_words = panels * PANEL / in_word, value_panels = panels_of(columns);
    int32_t *probabilities = scratch;
    float *scores = (float *)(probabilities + QUERIES * key_words), *sums = scores + QUERIES * panels * PANEL;
    for (int64_t start = 0; start < n; start += QUERIES) {
        const int64_t here = least(n - start, QUERIES);
        for (int64_t panel = 0; panel < panels; panel++) {
            for (int64_t i = 0; i < here; i += SIDE) {
                multiply_panel(least(here - i, SIDE), VECTORS, queries + (start + i) * apart, apart,
                               keys + panel * PANEL * words, words, scores + (i * panels + panel * SIDE) * PANEL, 0,
                               bfloat16);
            }
        }
        float totals[QUERIES];
        for (int64_t i = 0; i < here; i++) {
            float *of_query = scores + (i / SIDE * panels * SIDE + i % SIDE) * PANEL; /* then those of SIDE panels on */
            for (int64_t key = n_keys; key < panels * PANEL; key++) {                 /* there are no such keys */
                of_query[key / PANEL * SIDE * PANEL + key % PANEL] = -__builtin_inff();
            }
            Eight most = eight_at(of_query), sum = {0};
            for (int64_t panel = 0; panel < panels; panel++) {
                for (int k = 0; k < PANEL; k += 8) {
                    most = larger(most, eight_at(of_query + panel * SIDE * PANEL + k));
                }
            }
            const float most_of_all = largest(most);
            for (int64_t panel = 0; panel < panels; panel++) {
                sum = exponentials(of_query + panel * SIDE * PANEL, most_of_all, scale, sum,
                                   (uint8_t *)(probabilities + i * key_words + panel * PANEL / in_word), bfloat16);
            }
            totals[i] = sum_of(sum);
        }
        for (int64_t first = 0; first < key_words; first += DEPTH) {
            const int64_t part = least(key_words - first, DEPTH);
            for (int64_t panel = 0; panel < value_panels; panel++) {
                const int32_t *rows = values + (panel * key_words + first) * PANEL;
                const int64_t left = columns - panel * PANEL;
                for (int64_t i = 0; i < here; i += SIDE) {
                    const uint8_t *x = (const uint8_t *)(probabilities + i * key_words + first);
                    const int64_t few = least(here - i, SIDE);
                    float *to = sums + (i * value_panels + panel * SIDE) * PANEL;
                    if (left > 2 * LANES) {
                        multiply_panel(few, 3, x, 4 * key_words, rows, part, to, first > 0, bfloat16);
                    } else if (left > LANES) {
                        multiply_panel(few, 2, x, 4 * key_words, rows, part, to, first > 0, bfloat16);
                    } else {
                        multiply_panel(few, 1, x, 4 * key_words, rows, part, to, first > 0, bfloat16);
                    }
                }
            }
        }
        for (int64_t i = 0; i < here; i++) {
            for (int64_t panel = 0; panel < value_panels; panel++) {
                float *at = sums + (i / SIDE * value_panels + panel) * SIDE * PANEL + i % SIDE * PANEL;
                for (int j = 0; j < PANEL; j++) {
                    at[j] /= totals[i];
                }
                write_sums(at, least(columns - panel * PANEL, PANEL),
                           out + (start + i) * out_bytes + panel * PANEL * 4 / in_word, bfloat16);
            }
        }
    }
}

/*
 * queries        n of them, apart bytes apart
 * keys, values   of so many keys, as lay_out_keys and lay_out_values make them
 * columns        of a query, a key and a value
 * out            where a query's go, out_bytes apart
 * scratch        QUERIES * (PANEL * (panels of keys) + the words of as many keys + PANEL * (panels of columns))
 */
#define ATTENTION(name, bfloat16)                                                                                      \
    API void name(const uint8_t *queries, int64_t apart, int64_t n, const int32_t *keys, const int32_t *values,        \
                  int64_t n_keys, int64_t columns, float scale, uint8_t *out, int64_t out_bytes, int32_t *scratch) {   \
        attend_to(queries, apart, n, keys, values, n_keys, columns, scale, out, out_bytes, scratch, bfloat16);         \
    }

ATTENTION(attention, 0)
#if defined(__AVX512BF16__) && LANES == 16
ATTENTION(attention_bf16, 1)
#endif
#endif
