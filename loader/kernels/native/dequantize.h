/*
 * What the dequantizers share: 16 weights at a time in vectors, which gcc and clang have for every processor, and the
 * functions that are made of an unpack_<type>. Intrinsics are for the few steps that compilers do not vectorise well;
 * each has a plain twin, which -DPLAIN takes everywhere.
 *
 * Layouts and formulas are those of block_* and dequantize_row_* in ggml's ggml-common.h and ggml-quants.c.
 */
#include "native.h"

#if defined(__AVX2__) && defined(__F16C__) && !defined(PLAIN)
#define X86 1
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(PLAIN)
#define ARM 1
#include <arm_neon.h>
#endif

#if X86
#define LANES 8
#define LANE_SHIFTS {31, 30, 29, 28, 27, 26, 25, 24}
#else
#define LANES 4
#define LANE_SHIFTS {31, 30, 29, 28}
#endif
#define PARTS (16 / LANES)

#define INLINE static inline __attribute__((always_inline))

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int8_t SignedBytes __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint64_t Halves __attribute__((vector_size(16)));
typedef float FloatLanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t WordLanes __attribute__((vector_size(4 * LANES)));
typedef struct {
    FloatLanes part[PARTS];
} Floats; /* 16 of them */

/* BFLOAT16 is of numbers none of which is subnormal, as no weight of a type is whose scale is a half */
enum format { FLOAT32, BFLOAT16, ANY_BFLOAT16, FLOAT16 };

INLINE uint16_t half_word_at(const uint8_t *at) {
    uint16_t word;
    memcpy(&word, at, 2);
    return word;
}

INLINE uint32_t word_at(const uint8_t *at) {
    uint32_t word;
    memcpy(&word, at, 4);
    return word;
}

INLINE uint64_t long_at(const void *at) {
    uint64_t word;
    memcpy(&word, at, 8);
    return word;
}

INLINE Bytes bytes_at(const uint8_t *at) {
    Bytes bytes;
    memcpy(&bytes, at, 16);
    return bytes;
}

/* the 16-bit float at an address; a NaN without its payload, which could carry into the sign when it is rounded */
INLINE float scale_at(const uint8_t *at) {
#if X86
    const float value = _cvtsh_ss(half_word_at(at));
#elif ARM
    __fp16 half;
    memcpy(&half, at, 2);
    const float value = half;
#else
    const float value = half_at(at);
#endif
    return value == value ? value : float_of_bits(0x7fc00000);
}

/* the values that 16 indices below 16 stand for */
INLINE SignedBytes look_up(SignedBytes values, Bytes index) {
#if X86
    return (SignedBytes)_mm_shuffle_epi8((__m128i)values, (__m128i)index);
#elif ARM
    return (SignedBytes)vqtbl1q_s8((int8x16_t)values, (uint8x16_t)index);
#else
    SignedBytes found;
    for (int i = 0; i < 16; i++) {
        found[i] = values[index[i]];
    }
    return found;
#endif
}

/* bytes of 1 where a bit is set, of the 16 bits from the given one on, 0 or 16 */
INLINE Bytes spread_bits(uint32_t bits, int from) {
    const Bytes bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const Bytes index = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    const Bytes repeated = (Bytes)look_up((SignedBytes)(Words){bits}, index + (uint8_t)(from / 8));
    return (Bytes)((repeated & bit) == bit) & 1;
}

/* 16 signed bytes as floats, given in two halves */
INLINE Floats floats_of_halves(uint64_t low, uint64_t high) {
    Floats x;
#if X86
    x.part[0] = (FloatLanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)low)));
    x.part[1] = (FloatLanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)high)));
#elif ARM
    const int16x8_t a = vmovl_s8(vcreate_s8(low)), b = vmovl_s8(vcreate_s8(high));
    x.part[0] = (FloatLanes)vcvtq_f32_s32(vmovl_s16(vget_low_s16(a)));
    x.part[1] = (FloatLanes)vcvtq_f32_s32(vmovl_high_s16(a));
    x.part[2] = (FloatLanes)vcvtq_f32_s32(vmovl_s16(vget_low_s16(b)));
    x.part[3] = (FloatLanes)vcvtq_f32_s32(vmovl_high_s16(b));
#else
    const SignedBytes bytes = (SignedBytes)(Halves){low, high};
    float values[16];
    for (int i = 0; i < 16; i++) {
        values[i] = (float)bytes[i];
    }
    memcpy(&x, values, 64);
#endif
    return x;
}

INLINE Floats floats_of(SignedBytes bytes) {
#if X86
    Floats x;
    const __m128i high = _mm_srli_si128((__m128i)bytes, 8);
    x.part[0] = (FloatLanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32((__m128i)bytes));
    x.part[1] = (FloatLanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high));
    return x;
#else
    return floats_of_halves(((Halves)bytes)[0], ((Halves)bytes)[1]);
#endif
}

INLINE Floats floats(float value) {
    Floats x;
    UNROLLED
    for (int i = 0; i < PARTS; i++) {
        x.part[i] = (FloatLanes)((WordLanes){0} + bits_of_float(value));
    }
    return x;
}

INLINE Floats times(Floats x, float scale) {
    UNROLLED
    for (int i = 0; i < PARTS; i++) {
        x.part[i] *= scale;
    }
    return x;
}

INLINE Floats plus(Floats x, float offset) {
    UNROLLED
    for (int i = 0; i < PARTS; i++) {
        x.part[i] += offset;
    }
    return x;
}

/* turned to the other sign where one of 16 bits is set */
INLINE Floats with_signs(Floats x, uint32_t bits) {
    const WordLanes shifts = LANE_SHIFTS;
    UNROLLED
    for (int i = 0; i < PARTS; i++) {
        const WordLanes all = (WordLanes){0} + (bits >> LANES * i);
        x.part[i] = (FloatLanes)((WordLanes)x.part[i] ^ (all << shifts & 0x80000000));
    }
    return x;
}

/* write 16 numbers from the given one on, rounded to nearest, ties to even */
INLINE void put(void *out, int at, Floats x, enum format format) {
    if (format == FLOAT32) {
        UNROLLED
        for (int i = 0; i < PARTS; i++) {
            memcpy((float *)out + at + LANES * i, &x.part[i], 4 * LANES);
        }
        return;
    }
    uint16_t *halves = (uint16_t *)out + at;
#if X86 && defined(__AVX512BF16__) && defined(__AVX512VL__)
    if (format == BFLOAT16) { /* which takes subnormal numbers for zero */
        UNROLLED
        for (int i = 0; i < PARTS; i++) {
            _mm_storeu_si128((__m128i *)(halves + LANES * i), (__m128i)_mm256_cvtneps_pbh((__m256)x.part[i]));
        }
        return;
    }
#endif
    if (format == BFLOAT16 || format == ANY_BFLOAT16) {
        WordLanes bits[PARTS];
        UNROLLED
        for (int i = 0; i < PARTS; i++) {
            bits[i] = (WordLanes)x.part[i];
            bits[i] = (bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16;
        }
#if X86
        const __m256i packed = _mm256_packus_epi32((__m256i)bits[0], (__m256i)bits[1]);
        _mm256_storeu_si256((__m256i *)halves, _mm256_permute4x64_epi64(packed, 0xd8));
#elif ARM
        const uint16x8_t low = vmovn_high_u32(vmovn_u32((uint32x4_t)bits[0]), (uint32x4_t)bits[1]);
        const uint16x8_t high = vmovn_high_u32(vmovn_u32((uint32x4_t)bits[2]), (uint32x4_t)bits[3]);
        vst1q_u16(halves, low);
        vst1q_u16(halves + 8, high);
#else
        for (int i = 0; i < 16; i++) {
            halves[i] = (uint16_t)bits[i / LANES][i % LANES];
        }
#endif
        return;
    }
#if X86
    for (int i = 0; i < PARTS; i++) {
        const __m128i rounded = _mm256_cvtps_ph((__m256)x.part[i], _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)(halves + 8 * i), rounded);
    }
#elif ARM
    for (int i = 0; i < PARTS; i++) {
        vst1_u16(halves + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x.part[i])));
    }
#else
    for (int i = 0; i < PARTS; i++) {
        const WordLanes bits = (WordLanes)x.part[i], magnitude = bits & 0x7fffffff, rebased = magnitude - 0x38000000;
        const WordLanes normal = (rebased + 0xfff + (rebased >> 13 & 1)) >> 13;
        /* The last bit of 1/2 as a float is worth that of a subnormal half. */
        const WordLanes subnormal = (WordLanes)((FloatLanes)magnitude + 0.5f) - 0x3f000000;
        const WordLanes is_small = (WordLanes)(magnitude < 0x38800000), is_finite = (WordLanes)(magnitude < 0x477ff000);
        const WordLanes finite = (is_small & subnormal) | (~is_small & normal);
        const WordLanes large = 0x7c00 | ((WordLanes)(magnitude > 0x7f800000) & 0x200);
        const WordLanes rounded = (bits >> 16 & 0x8000) | (is_finite & finite) | (~is_finite & large);
        for (int lane = 0; lane < LANES; lane++) {
            halves[LANES * i + lane] = (uint16_t)rounded[lane];
        }
    }
#endif
}

/* dequantize_<type>, dequantize_<type>_bf16 and dequantize_<type>_f16: packed blocks, numbers, how many blocks */
#define DEQUANTIZERS(type, bytes, weights)                                                                             \
    DEQUANTIZER(type, , float, FLOAT32, bytes, weights)                                                                \
    DEQUANTIZER(type, _bf16, uint16_t, BFLOAT16, bytes, weights)                                                       \
    DEQUANTIZER(type, _f16, uint16_t, FLOAT16, bytes, weights)
#define DEQUANTIZER(type, suffix, number, format, bytes, weights)                                                      \
    API void dequantize_##type##suffix(const uint8_t *restrict packed, number *restrict out, int64_t blocks) {         \
        for (int64_t block = 0; block < blocks; block++) {                                                             \
            unpack_##type(packed + (bytes) * block, out + (weights) * block, format);                                  \
        }                                                                                                              \
    }

/* the same with a grid as the last argument */
#define GRID_DEQUANTIZERS(type, bytes)                                                                                 \
    GRID_DEQUANTIZER(type, , float, FLOAT32, bytes)                                                                    \
    GRID_DEQUANTIZER(type, _bf16, uint16_t, BFLOAT16, bytes)                                                           \
    GRID_DEQUANTIZER(type, _f16, uint16_t, FLOAT16, bytes)
#define GRID_DEQUANTIZER(type, suffix, number, format, bytes)                                                          \
    API void dequantize_##type##suffix(const uint8_t *restrict packed, number *restrict out, int64_t blocks,           \
                                       const int8_t *restrict grid) {                                                  \
        for (int64_t block = 0; block < blocks; block++) {                                                             \
            unpack_##type(packed + (bytes) * block, out + 256 * block, format, grid);                                  \
        }                                                                                                              \
    }
