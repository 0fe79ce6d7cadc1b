// Matrix products for CPUs, a few rows of activations [T, D] with a matrix [N, D] as it lies in memory: fp32, bf16, int8 with a scale a row,
// or int4 with a scale a group of columns. Built and called by library.py as kernels.cpp is.
//
// At one row the matrix is read at memory speed; at many rows the arithmetic bounds. A bf16 matrix is multiplied in fp32. For integers each
// stretch of CHUNK columns of a row of activations becomes int16 with a scale of its own, far finer than bf16, and sums are exact int32.

#include "kernels.h"

#include <vector>

typedef unsigned words __attribute__((vector_size(VL * 4), aligned(2)));
typedef float f8 __attribute__((vector_size(32), aligned(4)));
typedef int i8 __attribute__((vector_size(32), aligned(2)));

static const int PAIR = 2 * VL;                   // a vector of words holds PAIR numbers of two bytes
static const int CHUNK = 256, BLOCK = 32;                     // columns with one scale of activations; columns of 16 bytes in int4
static const int MAX_ROWS = 64, L1_BYTES = 24 << 10;          // rows of activations made ready at once; of the matrix while they pass
static const int AHEAD = 3;                                   // tiles of the matrix that are fetched before they are due
static const int64_t MIN_SHARED = 1 << 18;                    // products of numbers that are worth another thread
static const int MIN_TILED[] = {INT32_MAX, 2, 7, 6};            // rows of activations that tiles pay for, by the kind of matrix

static inline float get(const int8_t* p) { return *p; }
template <typename V> static inline float sum_across(V x) { float s = 0; for (size_t j = 0; j < sizeof(V) / 4; j++) s += x[j]; return s; }
#ifdef __AVX2__
static inline float sum_across(f8 x) {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}
#endif

template <typename T> struct Aligned {  // to a line of the cache: vectors that cross two take twice as long
    std::vector<char> memory;
    T* values = nullptr;
    void resize(int64_t n) { memory.resize(n * sizeof(T) + 64); values = (T*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63); }
    T* data() const { return values; }
    T& operator[](int64_t i) const { return values[i]; }
};

// ---- bf16: activations in fp32, of each PAIR the even ones before the odd ones ----

struct Floats {
    Aligned<float> values;
    int width;  // of a row
    template <typename A> void fill(const A* x, int r, int d, int) {
        float* row = values.data() + (int64_t)r * width;
        int k = 0;
        for (; k + PAIR <= d; k += PAIR) for (int j = 0; j < VL; j++) { row[k + j] = get(x + k + 2 * j); row[k + VL + j] = get(x + k + 2 * j + 1); }
        if (k < d) memset(row + k, 0, PAIR * sizeof(float));
        for (int j = 0; k + j < d; j++) row[k + j / 2 + j % 2 * VL] = get(x + k + j);
    }
};

struct Bf16Matrix {
    typedef Floats Rows;
    const bf16* weight;
    int d;
    int64_t bytes() const { return (int64_t)d * 2; }
    template <int R, int N> void tile(const Rows& x, int r0, int n0, float out[R][N]) const {
        constexpr int S = R * N < 8 ? 2 : 1;  // sums, enough to hide what an addition takes
        vec acc[R][N][S] = {};
        const float* row = x.values.data() + (int64_t)r0 * x.width;
        const bf16* w = weight + (int64_t)n0 * d;
        const auto step = [&](int k, const words* part) {
            for (int n = 0; n < N; n++) {
                const vec even = (vec)(part[n] << 16), odd = (vec)(part[n] & 0xffff0000u);
                for (int r = 0; r < R; r++) {
                    acc[r][n][0] += *(const vec*)(row + (int64_t)r * x.width + k) * even;
                    acc[r][n][S - 1] += *(const vec*)(row + (int64_t)r * x.width + k + VL) * odd;
                }
            }
        };
        int k = 0;
        for (; k + PAIR <= d; k += PAIR) {
            words part[N];
            for (int n = 0; n < N; n++) {
                part[n] = *(const words*)(w + (int64_t)n * d + k);
                __builtin_prefetch(w + (int64_t)(n + AHEAD * N) * d + k);
            }
            step(k, part);
        }
        if (k < d) {
            words part[N] = {};
            for (int n = 0; n < N; n++) memcpy(&part[n], w + (int64_t)n * d + k, (d - k) * sizeof(bf16));
            step(k, part);
        }
        for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) out[r][n] = sum_across(S == 2 ? acc[r][n][0] + acc[r][n][1] : acc[r][n][0]);
    }
};

// ---- fp32 ----

struct PlainFloats {
    Aligned<float> values;
    int width;  // of a row
    template <typename A> void fill(const A* x, int r, int d, int) {
        float* row = values.data() + (int64_t)r * width;
        for (int k = 0; k < d; k++) row[k] = get(x + k);
        memset(row + d, 0, (width - d) * sizeof(float));
    }
};

struct Fp32Matrix {
    typedef PlainFloats Rows;
    const float* weight;
    int d;
    int64_t bytes() const { return (int64_t)d * 4; }
    template <int R, int N> void tile(const Rows& x, int r0, int n0, float out[R][N]) const {
        constexpr int S = R * N < 8 ? 2 : 1;
        vec acc[R][N][S] = {};
        const float *row = x.values.data() + (int64_t)r0 * x.width, *w = weight + (int64_t)n0 * d;
        const auto step = [&](int k, int s, const vec* part) {
            for (int n = 0; n < N; n++) for (int r = 0; r < R; r++) acc[r][n][s] += load(row + (int64_t)r * x.width + k) * part[n];
        };
        int k = 0;
        for (; k + PAIR <= d; k += PAIR) {
            vec part[2][N];
            for (int n = 0; n < N; n++) {
                part[0][n] = load(w + (int64_t)n * d + k);
                part[1][n] = load(w + (int64_t)n * d + k + VL);
                __builtin_prefetch(w + (int64_t)(n + AHEAD * N) * d + k);
            }
            step(k, 0, part[0]);
            step(k + VL, S - 1, part[1]);
        }
        for (; k < d; k += VL) {
            vec part[N];
            for (int n = 0; n < N; n++) part[n] = some(w + (int64_t)n * d + k, d - k);
            step(k, 0, part);
        }
        for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) out[r][n] = sum_across(S == 2 ? acc[r][n][0] + acc[r][n][1] : acc[r][n][0]);
    }
};

// ---- integers: activations in int16, with a scale a chunk ----

static inline i8 multiply_add(i8 sum, i8 a, i8 b) {  // of sixteen int16 each, neighbours added
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (i8)_mm256_dpwssd_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return sum + (i8)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    int16_t x[16], y[16];
    memcpy(x, &a, 32);
    memcpy(y, &b, 32);
    for (int j = 0; j < 8; j++) sum[j] += x[2 * j] * y[2 * j] + x[2 * j + 1] * y[2 * j + 1];
    return sum;
#endif
}
static inline i8 wide(const int8_t* p) {
#ifdef __AVX2__
    return (i8)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
    int16_t x[16];
    for (int j = 0; j < 16; j++) x[j] = p[j];
    i8 out;
    memcpy(&out, x, 32);
    return out;
#endif
}
static inline i8 wide(const int16_t* p) { return *(const i8*)p; }
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define WIDE  // 32 numbers at once
static inline __m512i wide32(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
static inline __m512i wide32(const int16_t* p) { return _mm512_loadu_si512(p); }
#endif
static inline i8 dot(i8 a, i8 b) {  // of 32 bytes each, a 0 to 15 and b signed, four neighbours added
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (i8)_mm256_dpbusd_epi32(_mm256_setzero_si256(), (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return (i8)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)a, (__m256i)b), _mm256_set1_epi16(1));
#else
    uint8_t x[32];
    int8_t y[32];
    memcpy(x, &a, 32);
    memcpy(y, &b, 32);
    i8 sum = {};
    for (int j = 0; j < 32; j++) sum[j / 4] += x[j] * y[j];
    return sum;
#endif
}
static inline f8 floats(i8 x) { return __builtin_convertvector(x, f8); }

struct Integers {
    Aligned<int16_t> values;
    Aligned<float> scales;  // [rows, chunks]
    int width, chunks;
    float top;           // the largest integer
    const float* given;  // scales of rows that are integers already
    void fill(const int8_t* x, int r, int d, int row_of_all) {
        int16_t* row = values.data() + (int64_t)r * width;
        for (int k = 0; k < d; k++) row[k] = x[k];
        memset(row + d, 0, (width - d) * sizeof(int16_t));
        for (int c = 0; c < chunks; c++) scales[(int64_t)r * chunks + c] = given[row_of_all];
    }
    template <typename A> void fill(const A* x, int r, int d, int) {
        int16_t* row = values.data() + (int64_t)r * width;
        for (int c = 0; c < chunks; c++) {
            const int at = c * CHUNK, count = d - at < CHUNK ? d - at : CHUNK;
            float v[CHUNK], largest = 0, none = 0;
            for (int k = 0; k < count; k++) v[k] = get(x + at + k);
            for (int k = 0; k < count; k++) { const float size = std::fabs(v[k]); largest = size > largest ? size : largest; none += v[k] * 0; }
            const float by = largest > 1e-30f && none == 0 ? top / largest : 0.f;
            scales[(int64_t)r * chunks + c] = none == 0 ? largest / top : NAN;  // what is no number stays none
            for (int k = 0; k < count; k++) { const float y = v[k] * by; row[at + k] = none == 0 ? (int16_t)(int)(y + (y < 0 ? -.5f : .5f)) : 0; }
        }
        memset(row + d, 0, (width - d) * sizeof(int16_t));
    }
};

template <typename W> struct IntegerMatrix {
    typedef Integers Rows;
    const W* weight;
    const float* scale;  // a row
    int stride;          // of a row, a multiple of 16; zeros beyond the columns
    int64_t bytes() const { return stride * sizeof(W); }
    template <int R, int N> void tile(const Rows& x, int r0, int n0, float out[R][N]) const {
        f8 total[R][N] = {};
        const int16_t* row = x.values.data() + (int64_t)r0 * x.width;
        const W* w = weight + (int64_t)n0 * stride;
        for (int c = 0; c < x.chunks; c++) {
            const int end = (c + 1) * CHUNK < stride ? (c + 1) * CHUNK : stride;
            i8 acc[R][N] = {};
            int k = c * CHUNK;
#ifdef WIDE
            __m512i twice[R][N] = {};
            for (; k + 32 <= end; k += 32) {
                __m512i part[N];
                for (int n = 0; n < N; n++) {
                    part[n] = wide32(w + (int64_t)n * stride + k);
                    if (sizeof(W) == 1) __builtin_prefetch(w + (int64_t)(n + AHEAD * N) * stride + k);
                }
                for (int r = 0; r < R; r++) {
                    const __m512i mine = _mm512_loadu_si512(row + (int64_t)r * x.width + k);
                    for (int n = 0; n < N; n++) twice[r][n] = _mm512_dpwssd_epi32(twice[r][n], part[n], mine);
                }
            }
            for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) acc[r][n] = (i8)_mm512_castsi512_si256(twice[r][n]) + (i8)_mm512_extracti64x4_epi64(twice[r][n], 1);
#endif
            for (; k < end; k += 16) {
                i8 part[N];
                for (int n = 0; n < N; n++) {
                    part[n] = wide(w + (int64_t)n * stride + k);
                    if (sizeof(W) == 1) __builtin_prefetch(w + (int64_t)(n + AHEAD * N) * stride + k);
                }
                for (int r = 0; r < R; r++) {
                    const i8 mine = *(const i8*)(row + (int64_t)r * x.width + k);
                    for (int n = 0; n < N; n++) acc[r][n] = multiply_add(acc[r][n], part[n], mine);
                }
            }
            for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) total[r][n] += floats(acc[r][n]) * x.scales[(int64_t)(r0 + r) * x.chunks + c];
        }
        for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) out[r][n] = sum_across(total[r][n]) * scale[n0 + n];
    }
};

// ---- int4: activations in int8, with a scale a BLOCK ----

struct Bytes {
    Aligned<int8_t> values;
    Aligned<float> scales, sums;  // [rows, blocks], sums of the block's activations
    int width, blocks;                // columns and blocks of a row, in whole chunks
    template <typename A> void fill(const A* x, int r, int d, int) {
        for (int b = 0; b < blocks; b++) {
            const int at = b * BLOCK, count = d - at < 0 ? 0 : d - at < BLOCK ? d - at : BLOCK;
            int8_t* to = values.data() + (int64_t)r * width + at;
            float v[BLOCK] = {}, largest = 0, none = 0;
            for (int k = 0; k < count; k++) v[k] = get(x + at + k);
            for (int k = 0; k < BLOCK; k++) { const float size = std::fabs(v[k]); largest = size > largest ? size : largest; none += v[k] * 0; }
            const float by = largest > 1e-30f && none == 0 ? 127.f / largest : 0.f, scale = none == 0 ? largest / 127.f : NAN;
            int sum = 0;
            for (int k = 0; k < BLOCK; k++) {
                const float y = none == 0 ? v[k] * by : 0.f;
                const int i = (int)(y + (y < 0 ? -.5f : .5f));
                to[k] = (int8_t)i;
                sum += i;
            }
            scales[(int64_t)r * blocks + b] = scale;
            sums[(int64_t)r * blocks + b] = 8 * scale * (float)sum;
        }
    }
};

// A row: of each 2 * BLOCK columns BLOCK bytes, in byte j column j and, in the high half, column BLOCK + j, both plus 8. Scales of blocks
// in bf16. Rows end with whole chunks of scales, and with whole pairs of blocks of bytes.
struct Int4Matrix {
    typedef Bytes Rows;
    const uint8_t* weight;
    const bf16* scale;
    int stride;
    int64_t bytes() const { return stride; }
    template <int R, int N> void tile(const Rows& x, int r0, int n0, float out[R][N]) const {
        constexpr int B = CHUNK / BLOCK;
        const int8_t* row = x.values.data() + (int64_t)r0 * x.width;
        const uint8_t* w = weight + (int64_t)n0 * stride;
        f8 acc[R][N] = {}, rest[R][N] = {};
        for (int c = 0; c < x.blocks; c += B) {
            float by[R][N][B];
            for (int n = 0; n < N; n++) {
                const f8 mine = scales(scale + (int64_t)(n0 + n) * x.blocks + c);
                for (int r = 0; r < R; r++) {
                    const int64_t at = (int64_t)(r0 + r) * x.blocks + c;
                    *(f8*)by[r][n] = mine * *(const f8*)(x.scales.data() + at);
                    rest[r][n] += mine * *(const f8*)(x.sums.data() + at);  // the 8 that every weight was raised by
                }
            }
            const int end = stride - c * (BLOCK / 2) < CHUNK / 2 ? stride - c * (BLOCK / 2) : CHUNK / 2;
            for (int k = 0, b = 0; k < end; k += BLOCK, b += 2) for (int n = 0; n < N; n++) {
                __builtin_prefetch(w + (int64_t)(n + AHEAD * N) * stride + c * (BLOCK / 2) + k);
                const i8 both = *(const i8*)(w + (int64_t)n * stride + c * (BLOCK / 2) + k), mask = i8{} + 0x0f0f0f0f;
                const i8 low = both & mask, high = both >> 4 & mask;
                for (int r = 0; r < R; r++) {
                    const int8_t* mine = row + (int64_t)r * x.width + (c + b) * BLOCK;
                    acc[r][n] += floats(dot(low, *(const i8*)mine)) * by[r][n][b];
                    acc[r][n] += floats(dot(high, *(const i8*)(mine + BLOCK))) * by[r][n][b + 1];
                }
            }
        }
        for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) out[r][n] = sum_across(acc[r][n] - rest[r][n]);
    }
    static f8 scales(const bf16* p) {
        typedef unsigned short h8 __attribute__((vector_size(16), aligned(2)));
        typedef unsigned u8 __attribute__((vector_size(32)));
        return (f8)(__builtin_convertvector(*(const h8*)p, u8) << 16);
    }
};

// ---- int4 with many rows: a stretch of the matrix becomes int16 once, with a scale a row, and activations integers of eleven bits ----

static const int MIN_EXPANDED = 8;                      // rows of activations for which that pays
static const float TOP_SCALE = 511, TOP_WIDE = 2047;    // 8 * 511 * 2047 * CHUNK is still an int32

struct WideInt4Matrix {
    typedef Integers Rows;
    Int4Matrix of;
    int blocks;  // scales of a row
    int64_t bytes() const { return 4 * of.stride; }
};
struct Expansion {
    Aligned<int16_t> values;
    Aligned<float> scales;
};

template <typename M> static inline const M& ready(const M& m, int, int, Expansion&) { return m; }
static inline IntegerMatrix<int16_t> ready(const WideInt4Matrix& m, int from, int to, Expansion& memory) {
    const int width = 2 * m.of.stride;
    memory.values.resize((int64_t)(to - from) * width);
    memory.scales.resize(to - from);
    for (int n = from; n < to; n++) {
        const bf16* scale = m.of.scale + (int64_t)n * m.blocks;
        int16_t* row = memory.values.data() + (int64_t)(n - from) * width;
        float largest = 0;
        for (int b = 0; b < m.blocks; b++) largest = get(scale + b) > largest ? get(scale + b) : largest;
        const float by = largest > 0 ? TOP_SCALE / largest : 0.f;
        memory.scales[n - from] = largest / TOP_SCALE;
        for (int b = 0; b * BLOCK < width; b += 2) {
            const uint8_t* both = m.of.weight + (int64_t)n * m.of.stride + b * (BLOCK / 2);
            const int16_t first = (int16_t)(get(scale + b) * by + .5f), second = (int16_t)(get(scale + b + 1) * by + .5f);
            for (int j = 0; j < BLOCK; j++) row[b * BLOCK + j] = (int16_t)(((both[j] & 15) - 8) * first);
            for (int j = 0; j < BLOCK; j++) row[(b + 1) * BLOCK + j] = (int16_t)(((both[j] >> 4) - 8) * second);
        }
    }
    return {memory.values.data() - (int64_t)from * width, memory.scales.data() - from, width};
}

// ---- products ----

template <int R, typename M, typename O> static void strip(const M& m, const typename M::Rows& x, int r0, int from, int to, int n, const float* bias, O* out) {
    constexpr int N = R == 4 ? 3 : 4;
    const auto write = [&](int at, int count, const float* found, int stride) {
        for (int r = 0; r < R; r++) for (int j = 0; j < count; j++) put(out + (int64_t)(r0 + r) * n + at + j, found[r * stride + j] + (bias ? bias[at + j] : 0));
    };
    int at = from;
    for (; at + N <= to; at += N) { float found[R][N]; m.template tile<R, N>(x, r0, at, found); write(at, N, found[0], N); }
    for (; at < to; at++) { float found[R][1]; m.template tile<R, 1>(x, r0, at, found); write(at, 1, found[0], 1); }
}

template <typename M, typename A, typename O> static void product(const M& m, typename M::Rows& x, const A* in, int rows, int n, int d, const float* bias, O* out, int threads) {
    const int wanted = (int)(L1_BYTES / m.bytes()), size = wanted < 12 ? 12 : wanted / 12 * 12, blocks = (n + size - 1) / size;
#pragma omp parallel if (threads > 1 && (int64_t)rows * n * d >= MIN_SHARED) num_threads(threads)
    {
        Expansion memory;
        for (int start = 0; start < rows; start += MAX_ROWS) {
            const int count = rows - start < MAX_ROWS ? rows - start : MAX_ROWS;
#pragma omp for schedule(static)
            for (int r = 0; r < count; r++) x.fill(in + (int64_t)(start + r) * d, r, d, start + r);
#pragma omp for schedule(static)
            for (int b = 0; b < blocks; b++) {
                const int from = b * size, to = from + size < n ? from + size : n;
                const auto& here = ready(m, from, to, memory);
                O* to_rows = out + (int64_t)start * n;
                int r = 0;
                for (; count - r >= 6 || count - r == 4; r += 4) strip<4>(here, x, r, from, to, n, bias, to_rows);
                for (; count - r >= 3; r += 3) strip<3>(here, x, r, from, to, n, bias, to_rows);
                if (count - r == 2) strip<2>(here, x, r, from, to, n, bias, to_rows);
                else if (count - r == 1) strip<1>(here, x, r, from, to, n, bias, to_rows);
            }
        }
    }
}

template <typename A, typename O> static void run(const Product& p) {
    const int held = p.rows < MAX_ROWS ? p.rows : MAX_ROWS;
    const A* in = (const A*)p.x;
    O* out = (O*)p.out;
    if (p.kind == 0) {
        PlainFloats x;
        x.width = (p.d + VL - 1) / VL * VL;
        x.values.resize((int64_t)held * x.width);
        return product(Fp32Matrix{(const float*)p.weight, p.d}, x, in, p.rows, p.n, p.d, p.bias, out, p.threads);
    }
    if (p.kind == 1) {
        Floats x;
        x.width = (p.d + PAIR - 1) / PAIR * PAIR;
        x.values.resize((int64_t)held * x.width);
        return product(Bf16Matrix{(const bf16*)p.weight, p.d}, x, in, p.rows, p.n, p.d, p.bias, out, p.threads);
    }
    const int int4_stride = (p.d + 2 * BLOCK - 1) / (2 * BLOCK) * BLOCK;
    const bool expand = p.kind == 3 && p.rows >= MIN_EXPANDED;
    if (p.kind == 2 || expand) {
        Integers x;
        x.width = expand ? 2 * int4_stride : (p.d + 15) / 16 * 16;
        x.chunks = (p.d + CHUNK - 1) / CHUNK;
        x.top = expand ? TOP_WIDE : 32767.f;
        x.given = (const float*)p.row_scale;
        x.values.resize((int64_t)held * x.width);
        x.scales.resize((int64_t)held * x.chunks);
        if (p.kind == 2) return product(IntegerMatrix<int8_t>{(const int8_t*)p.weight, (const float*)p.scale, x.width}, x, in, p.rows, p.n, p.d, p.bias, out, p.threads);
        const WideInt4Matrix matrix{{(const uint8_t*)p.weight, (const bf16*)p.scale, int4_stride}, x.chunks * (CHUNK / BLOCK)};
        return product(matrix, x, in, p.rows, p.n, p.d, p.bias, out, p.threads);
    }
    Bytes x;
    x.width = (p.d + CHUNK - 1) / CHUNK * CHUNK;
    x.blocks = x.width / BLOCK;
    x.values.resize((int64_t)held * x.width);
    x.scales.resize((int64_t)held * x.blocks);
    x.sums.resize((int64_t)held * x.blocks);
    product(Int4Matrix{(const uint8_t*)p.weight, (const bf16*)p.scale, int4_stride}, x, in, p.rows, p.n, p.d, p.bias, out, p.threads);
}

extern "C" void gristmill_product(const Product* p) {
    if (p->activations == 1 && p->rows >= MIN_TILED[p->kind] && tile_product(*p)) return;
    if (p->activations == 2) { if (p->out_type == 0) run<int8_t, float>(*p); else run<int8_t, bf16>(*p); }
    else if (p->activations == 0) run<float, float>(*p);
    else run<bf16, bf16>(*p);
}
