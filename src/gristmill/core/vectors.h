// Vectors of floats as wide as registers are, numbers in bf16, and elementary functions: what the kernels of all parts share.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif
typedef float vec __attribute__((vector_size(VL * 4), aligned(4)));
typedef int ivec __attribute__((vector_size(VL * 4)));
typedef unsigned uvec __attribute__((vector_size(VL * 4)));
typedef unsigned short hvec __attribute__((vector_size(VL * 2), aligned(2)));
typedef uint16_t bf16;

// Compilers make five instructions of these where there is one.
#if defined(__AVX512BW__)
static inline uvec wide(const bf16* p) { return (uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
static inline hvec low(uvec x) { return (hvec)_mm512_cvtepi32_epi16((__m512i)x); }
#elif defined(__AVX2__) && !defined(__AVX512F__)
static inline uvec wide(const bf16* p) { return (uvec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline hvec low(uvec x) {
    return (hvec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)x, (__m256i)x), 8));
}
#else
static inline uvec wide(const bf16* p) { return __builtin_convertvector(*(const hvec*)p, uvec); }
static inline hvec low(uvec x) { return __builtin_convertvector(x, hvec); }
#endif
static inline vec load(const float* p) { return *(const vec*)p; }
static inline vec load(const bf16* p) { return (vec)(wide(p) << 16); }
static inline uvec rounded_bits(vec x) { uvec u = (uvec)x; return u + 0x7fff + ((u >> 16) & 1); }
#if defined(__AVX512BF16__)
static inline hvec halved(vec x) { return (hvec)_mm512_cvtneps_pbh((__m512)x); }
#else
static inline hvec halved(vec x) { return low(rounded_bits(x) >> 16); }
#endif
static inline void store(float* p, vec x) { *(vec*)p = x; }
static inline void store(bf16* p, vec x) { *(hvec*)p = halved(x); }
static inline float get(const float* p) { return *p; }
static inline float get(const bf16* p) { uint32_t u = (uint32_t)*p << 16; float x; memcpy(&x, &u, 4); return x; }
static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) {
    uint32_t u; memcpy(&u, &x, 4);
    *p = (x != x) ? 0x7fc0 : (bf16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline vec rounded(vec x, const float*) { return x; }  // to the type behind the pointer
static inline vec rounded(vec x, const bf16*) { return (vec)(rounded_bits(x) & 0xffff0000u); }
static inline float rounded(float x, const float*) { return x; }
static inline float rounded(float x, const bf16*) { bf16 b; put(&b, x); return get(&b); }

// n numbers as vectors, the last of them under a mask or through a buffer.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
static inline unsigned first(int n) { return n >= VL ? 0xffff : (1u << n) - 1; }
static inline vec some(const float* p, int n) { return (vec)_mm512_maskz_loadu_ps(first(n), p); }
static inline vec some(const bf16* p, int n) { return (vec)((uvec)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)) << 16); }
static inline void keep(float* p, vec x, int n) { _mm512_mask_storeu_ps(p, first(n), (__m512)x); }
static inline void keep(bf16* p, vec x, int n) { _mm256_mask_storeu_epi16(p, first(n), (__m256i)halved(x)); }
#else
template <typename A> static inline vec some(const A* p, int n) {
    if (n >= VL) return load(p);
    A part[VL] = {};
    memcpy(part, p, n * sizeof(A));
    return load(part);
}
template <typename A> static inline void keep(A* p, vec x, int n) {
    if (n >= VL) return store(p, x);
    A part[VL];
    store(part, x);
    memcpy(p, part, n * sizeof(A));
}
#endif

#ifdef __AVX512F__
static inline float sum_of(vec x) { return _mm512_reduce_add_ps((__m512)x); }
static inline float max_of(vec x) { return _mm512_reduce_max_ps((__m512)x); }
#else
static inline float sum_of(vec x) { float s = 0; for (int j = 0; j < VL; j++) s += x[j]; return s; }
static inline float max_of(vec x) { float m = x[0]; for (int j = 1; j < VL; j++) m = x[j] > m ? x[j] : m; return m; }
#endif

// e^x for x <= 0 (or a rounding above), relative error below 2e-7; 0 below -87. NaN stays NaN. Polynomial: Cephes' expf.
static inline vec exp_(vec x) {
    const vec bounded = x < -87.f ? (vec{} - 87.f) : x;
    const ivec n = __builtin_convertvector(bounded * 1.44269504f - 0.5f, ivec);  // truncation towards 0 rounds, since x <= 0
    const vec whole = __builtin_convertvector(n, vec), r = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
    const vec y = 1.f + r + r * r * (0.5f + r * (1.6666665459e-1f + r * (4.1665795894e-2f + r * (8.3334519073e-3f + r * (1.3981999507e-3f + r * 1.9875691500e-4f)))));
    return x < -87.f ? vec{} : y * (vec)((n + 127) << 23);
}

// log x for normal x > 0, error below 2e-7 of it or of 1. Polynomial: Cephes' logf.
static inline vec log_(vec x) {
    const uvec bits = (uvec)x - 0x3f3504f3;  // so that the mantissa is between the roots of 1/2 and 2
    const vec power = __builtin_convertvector((ivec)bits >> 23, vec), m = (vec)((bits & 0x7fffff) + 0x3f3504f3) - 1.f, square = m * m;
    const vec low = 1.1676998740e-1f + m * (-1.1514610310e-1f + m * 7.0376836292e-2f);
    const vec high = 2.0000714765e-1f + m * (-1.6668057665e-1f + m * (1.4249322787e-1f + m * (-1.2420140846e-1f + m * low)));
    const vec y = m * square * (3.3333331174e-1f + m * (-2.4999993993e-1f + m * high));
    return m + (y - 2.12194440e-4f * power - 0.5f * square) + 0.693359375f * power;
}

// tanh x, relative error below 1e-6: by a Pade approximant below 1, by exponentials above.
static inline vec tanh_(vec x) {
    const vec size = x < 0 ? -x : x, s = x * x;
    const vec e = exp_(-2.f * size), far = (1.f - e) / (1.f + e);
    const vec near = x * (10395.f + s * (1260.f + s * 21.f)) / (10395.f + s * (4725.f + s * (210.f + s)));
    return size < 1 ? near : x < 0 ? -far : far;
}

enum { SILU, GELU, SQUARED_RELU };  // activations; GELU in its tanh form

static inline vec sigmoid(vec x) { const vec e = exp_(x < 0 ? x : -x); return (x < 0 ? e : vec{} + 1.f) / (1.f + e); }

// f(x) and its slope.
template <int KIND> static inline vec activated(vec x, vec* slope) {
    if (KIND == SILU) {
        const vec s = sigmoid(x);
        *slope = s * (1.f + x * (1.f - s));
        return x * s;
    }
    if (KIND == GELU) {
        const vec t = tanh_(0.7978845608f * (x + 0.044715f * x * x * x));
        *slope = 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * 0.7978845608f * (1.f + 0.134145f * x * x);
        return 0.5f * x * (1.f + t);
    }
    const vec y = x < 0 ? vec{} : x;
    *slope = 2.f * y;
    return y * y;
}
