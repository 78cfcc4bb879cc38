/*
 * What the files share. All of them take strict IEEE arithmetic, without contraction into multiply-adds and without
 * reassociation: build.py compiles them so.
 */
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define API __declspec(dllexport)
#else
#define API __attribute__((visibility("default")))
#endif

/* before a loop of at most 16 rounds, which is then none */
#if defined(PLAIN)
#define UNROLLED
#elif defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* the 16-bit float at an address */
static inline float half_at(const uint8_t *at) {
    uint16_t half;
    memcpy(&half, at, 2);
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13;
    if (rest >= 0x0f800000) { /* infinity and NaN */
        return float_of_bits(sign | 0x70000000 | rest);
    }
    return float_of_bits(sign | bits_of_float(float_of_bits(rest) * 0x1p112f));
}

/* blocks by one of the dequantizers, whose type has a grid, or NULL for it */
static inline void dequantize_with(void *dequantizer, const int8_t *grid, const uint8_t *packed, void *out,
                                   int64_t blocks) {
    union {
        void *address;
        void (*of_blocks)(const uint8_t *packed, void *out, int64_t blocks);
        void (*of_grid)(const uint8_t *packed, void *out, int64_t blocks, const int8_t *grid);
    } dequantize = {dequantizer};
    if (grid) {
        dequantize.of_grid(packed, out, blocks, grid);
    } else {
        dequantize.of_blocks(packed, out, blocks);
    }
}
