/*
 * Tokens as multiply.c takes them.
 */
#include "transpose.h"

/*
 * Panels of SIDE tokens: a word of each, then the next of each. A word is a float32, or a pair of bfloat16.
 *
 * tokens   apart bytes apart
 * out      ((n + SIDE - 1) / SIDE, words, SIDE)
 */
API void lay_out_tokens(const uint8_t *tokens, int64_t apart, int64_t n, int64_t words, int32_t *restrict out) {
    for (int64_t token = 0; token < n; token += SIDE) {
        rows_as_columns(tokens + token * apart, apart, n - token, words, out + token * words, SIDE);
    }
}
