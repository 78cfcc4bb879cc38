/*
 * The keys and values that attention.c multiplies. A word is a float32, or a pair of bfloat16.
 */
#include "panels.h"

#if defined(LANES)
/*
 * Panels of PANEL keys: a word of each, then the next of each; those that are not there are zeros.
 *
 * keys     apart bytes apart
 * out      ((n + PANEL - 1) / PANEL, words, PANEL)
 */
API void lay_out_keys(const uint8_t *keys, int64_t apart, int64_t n, int64_t words, int32_t *restrict out) {
    for (int64_t i = 0; i < panels_of(n) * PANEL; i += SIDE) {
        rows_as_columns(keys + i * apart, apart, n - i, words, out + i / PANEL * PANEL * words + i % PANEL, PANEL);
    }
}

/*
 * Panels of PANEL columns of values: the words of each for a key, or for a pair of keys, then for the next; those that
 * are not there are zeros.
 *
 * out      ((columns + PANEL - 1) / PANEL, whole panels of keys in words, PANEL)
 */
API void lay_out_values(const uint8_t *values, int64_t apart, int64_t n, int64_t columns, int32_t *restrict out) {
    const int64_t key_words = panels_of(n) * PANEL;
    for (int64_t key = 0; key < key_words; key++) {
        for (int64_t column = 0; column < columns; column += PANEL) {
            int32_t *to = out + column * key_words + key * PANEL;
            memset(to, 0, 4 * PANEL);
            if (key < n) {
                memcpy(to, values + key * apart + 4 * column, 4 * (size_t)least(columns - column, PANEL));
            }
        }
    }
}

/* the same of bfloat16 */
API void lay_out_values_bf16(const uint8_t *values, int64_t apart, int64_t n, int64_t columns, int32_t *restrict out) {
    const int64_t key_words = panels_of(n) * PANEL / 2;
    for (int64_t key = 0; key < 2 * key_words; key += 2) {
        for (int64_t column = 0; column < columns; column += PANEL) {
            int32_t *to = out + column * key_words + key / 2 * PANEL;
            uint16_t pair[2][PANEL] = {{0}};
            for (int64_t i = 0; i < 2 && key + i < n; i++) {
                memcpy(pair[i], values + (key + i) * apart + 2 * column, 2 * (size_t)least(columns - column, PANEL));
            }
            for (int j = 0; j < PANEL; j++) {
                to[j] = (int32_t)(pair[0][j] | (uint32_t)pair[1][j] << 16);
            }
        }
    }
}
#endif
