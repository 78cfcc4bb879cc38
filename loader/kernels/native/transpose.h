/*
 * Floats, or other words of 32 bits, transposed in registers, where the compiler has a builtin for it: SHUFFLED is
 * defined then.
 */
#include "native.h"

#if defined(__AVX2__) && !defined(PLAIN) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif

#if defined(SHUFFLED)
typedef float floats __attribute__((vector_size(32)));

/* 8 rows of 8, which are so many bytes apart, as 8 columns; compilers move floats one by one for it */
static inline void transposed_8(const void *in, int64_t apart, floats *x) {
    floats y[8];
    UNROLLED
    for (int i = 0; i < 8; i++) {
        memcpy(&x[i], (const uint8_t *)in + apart * i, sizeof x[i]);
    }
    UNROLLED
    for (int i = 0; i < 8; i += 2) {
        y[i] = SHUFFLED(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        y[i + 1] = SHUFFLED(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    UNROLLED
    for (int i = 0; i < 8; i += 4) {
        UNROLLED
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = SHUFFLED(y[i + j], y[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            x[i + 2 * j + 1] = SHUFFLED(y[i + j], y[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    UNROLLED
    for (int i = 0; i < 4; i++) {
        y[i] = SHUFFLED(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        y[i + 4] = SHUFFLED(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    UNROLLED
    for (int i = 0; i < 8; i++) {
        x[i] = y[i];
    }
}
#endif

enum { SIDE = 8 };

/*
 * Rows of words, which are `apart` bytes apart, as columns: the words of all rows, SIDE of them, then the next of all,
 * `width` words further on. Rows that are not there are zeros.
 */
static inline void rows_as_columns(const uint8_t *in, int64_t apart, int64_t rows, int64_t words, int32_t *restrict out,
                                   int64_t width) {
    int64_t k = 0;
#if defined(SHUFFLED)
    for (; rows >= SIDE && k + SIDE <= words; k += SIDE) {
        floats x[SIDE];
        transposed_8(in + 4 * k, apart, x);
        UNROLLED
        for (int i = 0; i < SIDE; i++) {
            memcpy(out + (k + i) * width, &x[i], sizeof x[i]);
        }
    }
#endif
    for (; k < words; k++) {
        for (int i = 0; i < SIDE; i++) {
            out[k * width + i] = 0;
            if (i < rows) {
                memcpy(out + k * width + i, in + i * apart + 4 * k, 4);
            }
        }
    }
}
