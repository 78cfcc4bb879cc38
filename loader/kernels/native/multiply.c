/*
 * The product of tokens with rows of a packed weight, in float32 or bfloat16, on one core of an x86 processor.
 *
 * After Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with the weight dequantized
 * while it is laid out. The layout is one of 32-bit words, each a float32 or a pair of bfloat16, which the processor
 * multiplies and adds at once. So the same code multiplies both:
 *
 *     for each group of rows, for each part of the columns     their weights stay in the second cache
 *         for each few tokens
 *             for each panel of rows, for each 8 of the tokens     their sums are in registers
 *
 * A sum is taken part by part of the columns, and in each of them in their order, from zero on; a multiply-add is not
 * rounded in between. So its bits depend neither on the other tokens and rows, nor on how wide the vectors are.
 */
#include "panels.h"

#if defined(LANES)
enum { CHUNK = 256 }; /* words of a row that are dequantized at a time */

/* most rows of a group, words of a part of the columns, and few tokens: whole panels, chunks, and SIDEs */
enum { GROUP = 384, DEPTH = CHUNK, FEW = 64 };
enum { GROUP_BF16 = 192, DEPTH_BF16 = 6 * CHUNK, FEW_BF16 = SIDE };

typedef struct {
    const uint8_t *packed;
    int64_t row_bytes;
    void *dequantizer;
    const int8_t *grid;
    int64_t block_bytes, block;
} Rows;

/*
 * So many bytes of each of n packed rows, dequantized. Those that come next, so many bytes further on, are asked for
 * meanwhile: they are too few at a time for the processor to foresee them, and to wait for them takes as long as to
 * dequantize them.
 */
INLINE void dequantize_rows(const Rows *rows, const uint8_t *packed, int64_t n, int64_t bytes, int64_t next,
                            int32_t *restrict dense) {
    for (int64_t i = 0; i < n; i++, packed += rows->row_bytes) {
        for (int64_t byte = 0; byte < bytes; byte += 64) {
            __builtin_prefetch(packed + next + byte);
        }
        dequantize_with(rows->dequantizer, rows->grid, packed, dense + i * CHUNK, bytes / rows->block_bytes);
    }
}

/* rows from the given one on as panels, so many words of each from the first on; `dense` is for SIDE * CHUNK words */
INLINE void lay_out(const Rows *rows, int64_t row, int64_t n, int64_t first, int64_t words, int32_t *restrict dense,
                    int32_t *restrict out, int64_t in_word) {
    for (int64_t i = 0; i < n || i % PANEL; i += SIDE) {
        const int64_t here = n - i < 0 ? 0 : least(n - i, SIDE);
        const uint8_t *packed = rows->packed + (row + i) * rows->row_bytes;
        for (int64_t k = 0; k < words; k += CHUNK) {
            const int64_t chunk = least(words - k, CHUNK);
            int32_t *to = out + i / PANEL * PANEL * words + i % PANEL + k * PANEL;
            if (!rows->dequantizer) {
                rows_as_columns(packed + 4 * (first + k), rows->row_bytes, here, chunk, to, PANEL);
                continue;
            }
            const int64_t start = first * in_word / rows->block * rows->block_bytes;
            const int64_t done = k * in_word / rows->block * rows->block_bytes;
            const int64_t bytes = chunk * in_word / rows->block * rows->block_bytes;
            const int64_t next = k + chunk < words ? bytes : SIDE * rows->row_bytes - done;
            dequantize_rows(rows, packed + start + done, here, bytes, next, dense);
            rows_as_columns((const uint8_t *)dense, 4 * CHUNK, here, chunk, to, PANEL);
        }
    }
}

INLINE void multiply_rows(const uint8_t *x, int64_t apart, int64_t tokens, const Rows *rows, int64_t n, int64_t columns,
                          uint8_t *out, int64_t out_bytes, int32_t *scratch, int bfloat16) {
    const int64_t in_word = bfloat16 ? 2 : 1, words = columns / in_word;
    const int64_t depth = bfloat16 ? DEPTH_BF16 : DEPTH, few = bfloat16 ? FEW_BF16 : FEW;
    const int64_t most = bfloat16 ? GROUP_BF16 : GROUP, group = bfloat16 && words <= depth ? most / 2 : most;
    int32_t *dense = scratch, *weights = dense + SIDE * CHUNK;
    float *sums = (float *)(weights + group * depth);
    for (int64_t start = 0; start < n; start += group) {
        const int64_t in_group = least(n - start, group);
        for (int64_t first = 0; first < words; first += depth) {
            const int64_t part = least(words - first, depth);
            lay_out(rows, start, in_group, first, part, dense, weights, in_word);
            for (int64_t some = 0; some < tokens; some += few) {
                for (int64_t row = 0; row < in_group; row += PANEL) {
                    for (int64_t token = some; token < least(some + few, tokens); token += SIDE) {
                        const int64_t here = least(tokens - token, SIDE);
                        float *to = sums + token * group + row * SIDE;
                        multiply_panel(here, VECTORS, x + token * apart + 4 * first, apart, weights + row * part, part,
                                       to, first > 0, bfloat16);
                        for (int64_t i = 0; first + part == words && i < here; i++) {
                            write_sums(to + i * PANEL, least(in_group - row, PANEL),
                                       out + (token + i) * out_bytes + (start + row) * 4 / in_word, bfloat16);
                        }
                    }
                }
            }
        }
    }
}

/*
 * x            so many tokens of so many columns, apart bytes apart
 * rows         n of them, row_bytes apart: dense, or packed
 * dequantizer  of packed rows, with its grid or NULL, and a block's bytes and columns, of which CHUNK words are whole
 *              blocks; or NULL
 * out          where the sums of the rows go, out_bytes apart for each token
 * scratch      SIDE * CHUNK + GROUP * (DEPTH + tokens) words, with the tokens in whole SIDEs, or the same of bfloat16's;
 *              it starts a line of the cache
 */
#define PRODUCT(name, bfloat16)                                                                                        \
    API void name(const uint8_t *x, int64_t apart, int64_t tokens, const uint8_t *packed, int64_t row_bytes,           \
                  void *dequantizer, const int8_t *grid, int64_t block_bytes, int64_t block, int64_t n,                \
                  int64_t columns, uint8_t *out, int64_t out_bytes, int32_t *scratch) {                                \
        const Rows rows = {packed, row_bytes, dequantizer, grid, block_bytes, block};                                  \
        multiply_rows(x, apart, tokens, &rows, n, columns, out, out_bytes, scratch, bfloat16);                         \
    }

PRODUCT(multiply, 0)
#if defined(__AVX512BF16__) && LANES == 16
PRODUCT(multiply_bf16, 1)
#endif
#endif
