/*
 * Groups of 256 float32 times ConvRot's Hadamard matrix of 256, H4 x H4 x H4 x H4 / 16: the sums of `rotated` in int8.py,
 * in its order. In place when out is in.
 */
#include "native.h"

static inline void four(float *x, int stride) {
    const float a = x[0], b = x[stride], c = x[2 * stride], d = x[3 * stride];
    const float p = a + b, m = a - b, q = c + d, n = c - d;
    x[0] = p + n;
    x[stride] = p - n;
    x[2 * stride] = m + q;
    x[3 * stride] = q - m;
}

API void rotate_256(const float *in, float *out, int64_t groups) {
    for (int64_t group = 0; group < groups; group++, in += 256, out += 256) {
        float x[256], y[256];
        /* strides 1 and 4 as columns of a transposed 16 x 16, so that neighbours are computed at a time */
        for (int i = 0; i < 16; i++) {
            for (int j = 0; j < 16; j++) {
                x[16 * j + i] = in[16 * i + j];
            }
        }
        for (int k = 0; k < 4; k++) {
            for (int i = 0; i < 16; i++) {
                four(x + 64 * k + i, 16);
            }
        }
        for (int i = 0; i < 64; i++) {
            four(x + i, 64);
        }
        for (int i = 0; i < 16; i++) {
            for (int j = 0; j < 16; j++) {
                y[16 * j + i] = x[16 * i + j];
            }
        }
        for (int k = 0; k < 4; k++) {
            for (int i = 0; i < 16; i++) {
                four(y + 64 * k + i, 16);
            }
        }
        for (int i = 0; i < 64; i++) {
            four(y + i, 64);
        }
        for (int i = 0; i < 256; i++) {
            out[i] = y[i] * 0.0625f;
        }
    }
}
