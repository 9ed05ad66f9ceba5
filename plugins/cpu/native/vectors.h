/* Vectors of floats in GCC's vector extensions, as wide as the level's registers. */
#ifndef LINESHAFT_VECTORS_H
#define LINESHAFT_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi" /* wide vectors cross no call: every helper is inlined */

#define INLINE static inline __attribute__((always_inline))

/* WIDTH floats make a vector. Of two vectors, the pairs and the quads of each that `sums` adds up. COUNT
   numbers the places of one. */
#if defined(__AVX512F__)
#define WIDTH 16
#define EVEN 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define ODD 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define FORE 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define COUNT ((ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#define REAR 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#elif defined(__AVX2__)
#define WIDTH 8
#define EVEN 0, 8, 2, 10, 4, 12, 6, 14
#define ODD 1, 9, 3, 11, 5, 13, 7, 15
#define FORE 0, 1, 8, 9, 4, 5, 12, 13
#define COUNT ((ints){0, 1, 2, 3, 4, 5, 6, 7})
#define REAR 2, 3, 10, 11, 6, 7, 14, 15
#else
#define WIDTH 4
#define EVEN 0, 4, 2, 6
#define ODD 1, 5, 3, 7
#define FORE 0, 1, 4, 5
#define COUNT ((ints){0, 1, 2, 3})
#define REAR 2, 3, 6, 7
#endif

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef float floats4 __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));

/* Numbers in memory: bfloat16 (`narrow`) or float. `narrow` is constant where these are inlined. */

INLINE float load_one(const void *from, int64_t at, int narrow) {
    if (!narrow)
        return ((const float *)from)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)from)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE floats load(const void *from, int64_t at, int narrow) {
    floats value;
    if (!narrow) {
        memcpy(&value, (const float *)from + at, sizeof value);
    } else {
        halves bits;
        memcpy(&bits, (const uint16_t *)from + at, sizeof bits);
        value = (floats)(__builtin_convertvector(bits, words) << 16);
    }
    return value;
}

/* Two vectors of neighbouring numbers, in the order that is cheapest to get from memory: of bfloat16, the numbers at
   even places and those at odd ones. */
typedef struct {
    floats a, b;
} pair;

INLINE pair load_pair(const void *from, int64_t at, int narrow) {
    if (!narrow)
        return (pair){load(from, at, 0), load(from, at + WIDTH, 0)};
    words bits;
    memcpy(&bits, (const uint16_t *)from + at, sizeof bits);
    return (pair){(floats)(bits << 16), (floats)(bits & 0xffff0000)};
}

/* The bits of a float, or of a vector of them, as those of bfloat16 in the lower half: nearest, ties to even. A NaN
   stays one: made of bfloat16, it has no low bits that could carry. */
#define NARROWED(bits) (((bits) + 0x7fff + (((bits) >> 16) & 1)) >> 16)

INLINE void store_one(void *to, int64_t at, float value, int narrow) {
    if (!narrow) {
        ((float *)to)[at] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    ((uint16_t *)to)[at] = NARROWED(bits);
}

INLINE void store(void *to, int64_t at, floats value, int narrow) {
    if (!narrow) {
        memcpy((float *)to + at, &value, sizeof value);
        return;
    }
#if defined(__AVX512BF16__)
    const __m256bh bits = _mm512_cvtneps_pbh((__m512)value); /* as NARROWED, but for denormal numbers, which become 0 */
#else
    const halves bits = __builtin_convertvector(NARROWED((words)value), halves);
#endif
    memcpy((uint16_t *)to + at, &bits, sizeof bits);
}

/* Two vectors to places that follow each other. */
INLINE void store_two(void *to, int64_t at, floats a, floats b, int narrow) {
#if defined(__AVX512BF16__)
    if (narrow) {
        const __m512bh bits = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
        memcpy((uint16_t *)to + at, &bits, sizeof bits);
        return;
    }
#endif
    store(to, at, a, narrow);
    store(to, at + WIDTH, b, narrow);
}

INLINE void store_pair(void *to, int64_t at, pair value, int narrow) {
    if (!narrow) {
        store(to, at, value.a, 0);
        store(to, at + WIDTH, value.b, 0);
        return;
    }
    words bits = NARROWED((words)value.a) | NARROWED((words)value.b) << 16;
    memcpy((uint16_t *)to + at, &bits, sizeof bits);
}

INLINE floats splat(float value) { return value - (floats){0}; }

INLINE floats choose(ints mask, floats yes, floats no) { return (floats)(((ints)yes & mask) | ((ints)no & ~mask)); }

/* b where either is a NaN */
INLINE floats larger(floats a, floats b) {
#if WIDTH == 16
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

/* Lane i of the result sums the lanes i, i + 4, i + 8, ... of v. */
INLINE floats4 fold(floats v) {
    floats4 quads[WIDTH / 4];
    memcpy(quads, &v, sizeof quads);
    for (int step = WIDTH / 8; step; step /= 2)
        for (int i = 0; i < step; i++)
            quads[i] += quads[i + step];
    return quads[0];
}

INLINE float sum(floats v) {
    floats4 f = fold(v);
    return (f[0] + f[1]) + (f[2] + f[3]);
}

INLINE float maximum(floats v) {
#if WIDTH == 16
    return _mm512_reduce_max_ps((__m512)v);
#endif
    float best = v[0];
    for (int i = 1; i < WIDTH; i++)
        best = v[i] > best ? v[i] : best;
    return best;
}

INLINE int any(ints mask) {
#if WIDTH == 16
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#endif
    return sum((floats)(mask & (ints)splat(1.0f))) != 0;
}

/* The sums of four vectors at once. */
INLINE floats4 sums(floats a, floats b, floats c, floats d) {
    floats ab = __builtin_shufflevector(a, b, EVEN) + __builtin_shufflevector(a, b, ODD);
    floats cd = __builtin_shufflevector(c, d, EVEN) + __builtin_shufflevector(c, d, ODD);
    return fold(__builtin_shufflevector(ab, cd, FORE) + __builtin_shufflevector(ab, cd, REAR));
}

/* e^x to about one unit in the last place (Cephes' polynomial); 0 below -87, inf above 88. */
INLINE floats exponential(floats x) {
    floats inside = choose(x > 88.0f, splat(88.0f), choose(x < -87.0f, splat(-87.0f), x));
    floats shifted = inside * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's low bits are the rounded exponent */
    ints exponent = (ints)shifted - 0x4b400000;
    floats n = shifted - 12582912.0f;
    floats r = inside - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p *= (floats)((exponent + 127) << 23);
    p = choose(x < -87.0f, splat(0.0f), p);
    return choose(x > 88.0f, splat(INFINITY), p);
}

#define LOG2_E 1.44269504f

/* 2^x for x of at most 64, to 3e-6 of itself. */
INLINE floats quick_power(floats x) {
#if WIDTH == 16
    const floats part = (floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    floats p = (0.01353416f * part + 0.05201148f) * part + 0.24144274f;
    p = (p * part + 0.69300384f) * part + 1.00000259f;
    return (floats)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    const floats kept = larger(splat(-126.0f), x);
    const floats shifted = kept + 12582912.0f, r = kept - (shifted - 12582912.0f);
    const floats p = (((0.0095701f * r + 0.05591786f) * r + 0.24024744f) * r + 0.6931218f) * r + 0.9999993f;
    return (floats)((ints)p + ((ints)shifted << 23));
#endif
}

/* tanh x within 3e-7 of itself: by exp, but near 0, where its two terms cancel, by the polynomial x + x^3 p(x^2) that
   is nearest to it below 0.6 (least squares of the relative error). */
INLINE floats hyperbolic_tangent(floats x) {
    floats z = x * x;
    floats p = ((0.0155800991f * z - 0.0521883993f) * z + 0.133125984f) * z - 0.333325636f;
    return choose(z < 0.36f, x + x * z * p, 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f));
}

#endif
