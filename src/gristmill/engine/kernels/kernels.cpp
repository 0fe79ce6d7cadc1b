// Paged-attention kernel for CPUs, one layer of one step: rotates queries and keys, stores the step's keys and
// values in their blocks, attends. Built by library.py without any header of torch; called through ctypes.
//
// A block holds BS positions of one layer: keys [K, d, BS] (transposed, so that vector lanes run along positions), values
// [K, BS, e] with e = d rounded up to whole vectors. Where they are bytes (int8, fp8 e4m3), scales of keys [K, BS] and values [K, BS]
// follow, one for each head of a token.
// Rows of a tile are (token, query head) pairs that read the same keys. Scores and sums are float32 whatever the type in memory. Several tokens
// in bf16 go through tile_attention.cpp where the CPU has tile products.

#include "kernels.h"

#include <type_traits>
#include <vector>

typedef unsigned char bvec __attribute__((vector_size(VL), aligned(1)));
typedef signed char svec __attribute__((vector_size(VL), aligned(1)));
struct fp8 { uint8_t bits; };  // e4m3 without infinities

// Sums are over PAD numbers however wide vectors are, and so the same.
static const int BS = 32, PAD = 16, WORDS = BS / VL, PARTS = PAD / VL, MAX_ROWS = 8;
static const int SUMS = VL;  // vectors of sums that registers hold beside what is added

#if defined(__AVX512BW__)
static inline ivec wide(const int8_t* p) { return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline uvec wide(const fp8* p) { return (uvec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
#elif defined(__AVX2__) && !defined(__AVX512F__)
static inline ivec wide(const int8_t* p) { return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline uvec wide(const fp8* p) { return (uvec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
#else
static inline ivec wide(const int8_t* p) { return __builtin_convertvector(*(const svec*)p, ivec); }
static inline uvec wide(const fp8* p) { return __builtin_convertvector(*(const bvec*)p, uvec); }
#endif
static inline vec load(const int8_t* p) { return __builtin_convertvector(wide(p), vec); }
static inline vec load(const fp8* p) {
    const uvec u = wide(p), size = u & 0x7f;
    const vec tiny = __builtin_convertvector((ivec)size, vec) * (1.f / 512);  // below 2^-6 eighths of it, evenly
    return (vec)((size < 8 ? (uvec)tiny : (size << 20) + (120u << 23)) | (u & 0x80) << 24);
}
static inline void put(int8_t* p, float x) { *p = (int8_t)(int)(x + (x < 0 ? -.5f : .5f)); }
static inline void put(fp8* p, float x) {  // |x| <= 448
    uint32_t u; memcpy(&u, &x, 4);
    const uint32_t sign = u >> 24 & 0x80;
    u &= 0x7fffffff;
    if (u < 121u << 23) { p->bits = (uint8_t)(sign | (uint32_t)std::nearbyint(std::fabs(x) * 512.f)); return; }
    u += 0x7ffff + (u >> 20 & 1);
    p->bits = (uint8_t)(sign | ((u >> 20) - (120 << 3)));
}
static inline float most(const float*) { return 0; }  // largest value of a type with scales, 0 of one without
static inline float most(const bf16*) { return 0; }
static inline float most(const int8_t*) { return 127; }
static inline float most(const fp8*) { return 448; }
template <typename A> static inline void widen(const A* in, float* out, int n) {
    int i = 0;
    for (; i + VL <= n; i += VL) store(out + i, load(in + i));
    for (; i < n; i++) out[i] = get(in + i);
}
template <typename A> static inline void narrow(const float* in, A* out, int n) {
    int i = 0;
    for (; i + VL <= n; i += VL) store(out + i, load(in + i));
    for (; i < n; i++) put(out + i, in[i]);
}

#ifdef __AVX512F__
static inline float sum_of(const vec* x) { return _mm512_reduce_add_ps((__m512)*x); }  // of PARTS vectors
#else
static inline float sum_of(const vec* x) { float s = 0; for (int i = 0; i < PARTS; i++) for (int j = 0; j < VL; j++) s += x[i][j]; return s; }
#endif

// A head of one token, rotated, rounded to its type and scaled.
template <typename A> static inline void rotate(const A* in, float* __restrict out, int d, int pairs, const float* __restrict cos, const float* __restrict sin, float scale) {
    widen(in, out, d);
    for (int i = 0; i < pairs; i++) {
        const float a = out[i], b = out[i + pairs];
        out[i] = a * cos[i] - b * sin[i];
        out[i + pairs] = b * cos[i] + a * sin[i];
    }
    int i = 0;
    for (; i + VL <= d; i += VL) store(out + i, rounded(load(out + i), in) * scale);
    for (; i < d; i++) out[i] = rounded(out[i], in) * scale;
}

// n numbers as a type with scales, `stride` elements apart.
template <typename C> static inline void scaled(const float* in, int n, float top, C* out, int64_t stride, float* scale) {
    float largest = 0;
    for (int i = 0; i < n; i++) { const float x = std::fabs(in[i]); largest = x > largest ? x : largest; }
    *scale = largest / top;
    const float by = largest > 0 ? top / largest : 0.f;
    for (int i = 0; i < n; i++) { const float x = in[i] * by; put(out + i * stride, x > top ? top : x < -top ? -top : x); }
}

// W words of the sums of n values, weighted by scores: so many that they stay in registers.
template <int R, int W, typename C>
static void values(const C* cache, const int32_t* table, int64_t block_stride, int64_t v_at, int e, int n, const float* scores, int width, const float* inverse, float* out) {
    vec acc[R][W] = {};
    for (int p = 0; p * BS < n; p++) {
        const C* v = cache + table[p] * block_stride + v_at;
        const int filled = n - p * BS < BS ? n - p * BS : BS;
        for (int t = 0; t < filled; t++) {
            vec value[W];
            for (int w = 0; w < W; w++) value[w] = load(v + t * e + w * VL);
            for (int r = 0; r < R; r++) {
                const float s = scores[(int64_t)r * width + p * BS + t];
                for (int w = 0; w < W; w++) acc[r][w] += s * value[w];
            }
        }
    }
    for (int r = 0; r < R; r++) for (int w = 0; w < W; w++) *(vec*)(out + r * e + w * VL) = acc[r][w] * inverse[r];
}

// One tile: R rows over n keys of one head. q [R, d] is scaled; row r sees the keys before limit[r], and none before from[r].
template <int R, typename C>
static void tile(const float* q, const C* cache, const int32_t* table, int64_t block_stride, int64_t k_at, int64_t v_at, int64_t s_at, int64_t v_scales,
                 int d, int e, int n, const int* limit, const int* from, float cap, float* scores, float* out) {
    const int blocks = (n + BS - 1) / BS, width = blocks * BS;
    constexpr int AT_ONCE = SUMS / R < 1 ? 1 : SUMS / R < WORDS ? SUMS / R : WORDS, WIDE = SUMS / R < 1 ? 1 : SUMS / R < 4 ? SUMS / R : 4;
    ivec lane;
    for (int j = 0; j < VL; j++) lane[j] = j;
    vec top[R];
    for (int r = 0; r < R; r++) top[r] = vec{} - 1e30f;
    for (int p = 0; p < blocks; p++) {
        const C* k = cache + table[p] * block_stride + k_at;
        vec acc[R][WORDS];
        for (int from_word = 0; from_word < WORDS; from_word += AT_ONCE) {
            vec sum[R][AT_ONCE] = {};
            for (int i = 0; i < d; i++) {
                vec key[AT_ONCE];
                for (int w = 0; w < AT_ONCE; w++) key[w] = load(k + i * BS + (from_word + w) * VL);
                for (int r = 0; r < R; r++) for (int w = 0; w < AT_ONCE; w++) sum[r][w] += q[r * d + i] * key[w];
            }
            for (int r = 0; r < R; r++) for (int w = 0; w < AT_ONCE; w++) acc[r][from_word + w] = sum[r][w];
        }
        if (most(cache)) for (int w = 0; w < WORDS; w++) {
            const vec by = load((const float*)(cache + table[p] * block_stride + s_at) + w * VL);
            for (int r = 0; r < R; r++) acc[r][w] *= by;
        }
        if (from || cap > 0) for (int r = 0; r < R; r++) for (int w = 0; w < WORDS; w++) {
            if (cap > 0) acc[r][w] = cap * tanh_(acc[r][w] * (1.f / cap));
            if (from) acc[r][w] = lane + (p * BS + w * VL) >= from[r] ? acc[r][w] : (vec{} - 1e30f);
        }
        for (int r = 0; r < R; r++) for (int w = 0; w < WORDS; w++) {
            ivec seen = lane + (p * BS + w * VL) < limit[r];
            vec s = seen ? acc[r][w] : (vec{} - 1e30f);
            top[r] = s > top[r] ? s : top[r];
            *(vec*)(scores + (int64_t)r * width + p * BS + w * VL) = s;
        }
    }
    float inverse[R];
    for (int r = 0; r < R; r++) {
        const float m = max_of(top[r]);
        vec sum[PARTS] = {};
        float* s = scores + (int64_t)r * width;
        for (int p = 0; p < blocks; p++) for (int w = 0; w < WORDS; w++) {
            vec* at = (vec*)(s + p * BS + w * VL);
            vec e = exp_(*at - m);
            sum[w % PARTS] += e;
            if (most(cache)) e *= load((const float*)(cache + table[p] * block_stride + s_at) + v_scales + w * VL);
            *at = e;
        }
        inverse[r] = 1.f / sum_of(sum);
    }
    int at = 0;
    for (; at + WIDE * VL <= e; at += WIDE * VL) values<R, WIDE>(cache, table, block_stride, v_at + at, e, n, scores, width, inverse, out + at);
    for (; at < e; at += VL) values<R, 1>(cache, table, block_stride, v_at + at, e, n, scores, width, inverse, out + at);
}

// Key head h of sequence i, which has tokens of its prompt in this step.
static void attend_by_tiles(const Layer& l, const Step& s, int i, int h, float scale, const bf16* qkv, const bf16* cache, bf16* out) {
    const int H = l.heads, K = l.kv_heads, d = l.head_dim, G = H / K, e = (d + PAD - 1) / PAD * PAD, width = (d + BS - 1) / BS * BS;
    const int begin = s.query_start[i], count = s.query_start[i + 1] - begin, first = s.seq_lens[i] - count;
    std::vector<bf16> q((int64_t)(count * G + PAD - 1) / PAD * PAD * width);
    std::vector<float> head(d);
    for (int r = 0; r < count * G; r++) {
        const int64_t t = r / G, angle = (first + t) * l.pairs;
        rotate(qkv + ((begin + t) * (H + 2 * K) + h * (G + 2) + r % G) * d, head.data(), d, l.pairs, l.cos + angle, l.sin + angle, 1.f);
        narrow(head.data(), q.data() + (int64_t)r * width, d);
    }
    const int64_t k_at = l.k_offset + (int64_t)h * d * BS, v_at = l.v_offset + (int64_t)h * BS * e;
    const Queries queries{q.data(), s.block_tables + (int64_t)s.slots[i] * s.table_stride, s.block_stride, k_at, v_at, count * G, G, d, first, l.window, scale, l.cap};
    tile_attend(queries, cache, out + ((int64_t)begin * H + h * G) * d, (int64_t)H * d);
}

// A: type of activations, C: type of the cache. qkv [T, H + 2K, d] grouped by key head (its queries, its key, its value), out [T, H, d].
template <typename A, typename C> static void run(const Layer& l, const Step& s, const A* qkv, C* cache, A* out) {
    const int H = l.heads, K = l.kv_heads, d = l.head_dim, G = H / K, row = (H + 2 * K) * d, e = (d + PAD - 1) / PAD * PAD;
    const float scale = l.scale > 0 ? l.scale : 1.f / std::sqrt((float)d);
    // All keys and values first: sequences of one step may share blocks that one of them fills.
#pragma omp parallel for if (s.threads > 1) num_threads(s.threads) schedule(static)
    for (int i = 0; i < s.num_seqs; i++) {
        std::vector<float> key(d);
        const int count = s.query_start[i + 1] - s.query_start[i], first = s.seq_lens[i] - count;
        const int32_t* table = s.block_tables + (int64_t)s.slots[i] * s.table_stride;
        for (int t = 0; t < count; t++) {
            const int position = first + t, at = position % BS;
            const A* token = qkv + (int64_t)(s.query_start[i] + t) * row;
            C* block = cache + table[position / BS] * s.block_stride;
            for (int h = 0; h < K; h++) {
                rotate(token + (h * (G + 2) + G) * d, key.data(), d, l.pairs, l.cos + (int64_t)position * l.pairs, l.sin + (int64_t)position * l.pairs, 1.f);
                C* k = block + l.k_offset + (int64_t)h * d * BS + at;
                C* v = block + l.v_offset + ((int64_t)h * BS + at) * e;
                const A* value = token + (h * (G + 2) + G + 1) * d;
                if (const float top = most(cache)) {
                    float* scales = (float*)(block + l.s_offset) + h * BS + at;
                    scaled(key.data(), d, top, k, BS, scales);
                    widen(value, key.data(), d);
                    scaled(key.data(), d, top, v, 1, scales + K * BS);
                    continue;
                }
                for (int j = 0; j < d; j++) put(k + (int64_t)j * BS, key[j]);
                if (sizeof(A) == sizeof(C)) memcpy((void*)v, (const void*)value, d * sizeof(C));
                else for (int j = 0; j < d; j++) put(v + j, get(value + j));
            }
        }
    }
#pragma omp parallel if (s.threads > 1) num_threads(s.threads)
    {
        std::vector<float> q(MAX_ROWS * d), result(MAX_ROWS * e), scores;
#pragma omp for schedule(dynamic, 1)
        for (int job = 0; job < s.num_seqs * K; job++) {
            const int i = job / K, h = job % K;
            const int count = s.query_start[i + 1] - s.query_start[i], first = s.seq_lens[i] - count, rows = count * G;
            const int32_t* table = s.block_tables + (int64_t)s.slots[i] * s.table_stride;
            if constexpr (std::is_same_v<A, bf16> && std::is_same_v<C, bf16>) if (i >= s.num_decoding && gristmill_has_tiles()) {
                attend_by_tiles(l, s, i, h, scale, qkv, cache, out);
                continue;
            }
            const int64_t need = (int64_t)MAX_ROWS * ((s.seq_lens[i] + BS - 1) / BS * BS);
            if ((int64_t)scores.size() < need) scores.resize(need);
            for (int start = 0; start < rows;) {
                const int left = rows - start, size = left >= 8 ? 8 : left >= 4 ? 4 : left;
                int limit[MAX_ROWS];
                for (int r = 0; r < size; r++) {
                    const int t = (start + r) / G, g = (start + r) % G, position = first + t;
                    limit[r] = position + 1;
                    rotate(qkv + (int64_t)(s.query_start[i] + t) * row + (h * (G + 2) + g) * d, q.data() + r * d, d, l.pairs,
                           l.cos + (int64_t)position * l.pairs, l.sin + (int64_t)position * l.pairs, scale);
                }
                // Blocks that lie before the first row's window are left out.
                int from[MAX_ROWS] = {};
                const int skipped = l.window && limit[0] > l.window ? (limit[0] - l.window) / BS : 0;
                for (int r = 0; l.window && r < size; r++) {
                    from[r] = (limit[r] > l.window ? limit[r] - l.window : 0) - skipped * BS;
                    limit[r] -= skipped * BS;
                }
                const int n = limit[size - 1];
                const int64_t k_at = l.k_offset + (int64_t)h * d * BS, v_at = l.v_offset + (int64_t)h * BS * e;
                const int64_t s_at = l.s_offset + (int64_t)h * BS * sizeof(float);  // bytes, as elements are where there are scales
                const auto attend = [&](auto rows) {
                    rows(q.data(), cache, table + skipped, s.block_stride, k_at, v_at, s_at, (int64_t)K * BS, d, e, n, limit, l.window ? from : nullptr,
                         l.cap, scores.data(), result.data());
                };
                switch (size) {
                    case 8: attend(tile<8, C>); break;
                    case 4: attend(tile<4, C>); break;
                    case 3: attend(tile<3, C>); break;
                    case 2: attend(tile<2, C>); break;
                    default: attend(tile<1, C>);
                }
                for (int r = 0; r < size; r++) {
                    const int t = (start + r) / G, g = (start + r) % G;
                    A* to = out + ((int64_t)(s.query_start[i] + t) * H + h * G + g) * d;
                    narrow(result.data() + r * e, to, d);
                }
                start += size;
            }
        }
    }
}

template <typename A> static void run(const Layer& l, const Step& s, const A* qkv, void* cache, int type, A* out) {
    switch (type) {
        case 0: return run(l, s, qkv, (float*)cache, out);
        case 1: return run(l, s, qkv, (bf16*)cache, out);
        case 2: return run(l, s, qkv, (int8_t*)cache, out);
        default: run(l, s, qkv, (fp8*)cache, out);
    }
}

// Types: 0 float32, 1 bfloat16; of the cache also 2 int8, 3 fp8 e4m3.
extern "C" void gristmill_attend(const Layer* l, const Step* s, const void* qkv, int activations, void* cache, int type, void* out) {
    if (activations == 0) run(*l, *s, (const float*)qkv, cache, type, (float*)out);
    else run(*l, *s, (const bf16*)qkv, cache, type, (bf16*)out);
}

// ---- what stands between matrix products ----

static void quantize(const float* row, int n, int8_t* out, float* scale) {
    vec top16 = {};
    int i = 0;
    for (; i + VL <= n; i += VL) { vec v = load(row + i); v = v < 0 ? -v : v; top16 = v > top16 ? v : top16; }
    float largest = max_of(top16);
    for (; i < n; i++) { float v = std::fabs(row[i]); largest = v > largest ? v : largest; }
    *scale = largest / 127.f;
    const float inverse = largest > 0 ? 127.f / largest : 0.f;
    for (i = 0; i + VL <= n; i += VL) {
        vec v = load(row + i) * inverse;
        *(svec*)(out + i) = __builtin_convertvector(__builtin_convertvector(v + (v < 0 ? (vec{} - .5f) : (vec{} + .5f)), ivec), svec);
    }
    for (; i < n; i++) out[i] = (int8_t)(int)(row[i] * inverse + (row[i] >= 0 ? .5f : -.5f));
}

// x += delta if there is one; then the norm of each row: into out, or into int8 with a scale a row where out is null.
template <typename A>
static void norm(A* x, const A* delta, const float* gain, const float* bias, A* out, int8_t* small, float* scale, int rows, int n, float eps, int centred) {
    std::vector<float> row(n);
    for (int r = 0; r < rows; r++) {
        A* p = x + (int64_t)r * n;
        if (delta) {
            const A* more = delta + (int64_t)r * n;
            int i = 0;
            for (; i + VL <= n; i += VL) store(p + i, load(p + i) + load(more + i));
            for (; i < n; i++) put(p + i, get(p + i) + get(more + i));
        }
        double mean = 0, square = 0;
        float s = 0, q = 0;
        widen(p, row.data(), n);
        if (centred) { vec a[PARTS] = {}; int i = 0; for (; i + VL <= n; i += VL) a[i / VL % PARTS] += load(row.data() + i); s = sum_of(a); for (; i < n; i++) s += row[i]; mean = s / n; }
        const float m = (float)mean;
        { vec a[PARTS] = {}; int i = 0; for (; i + VL <= n; i += VL) { vec v = load(row.data() + i) - m; a[i / VL % PARTS] += v * v; } q = sum_of(a); for (; i < n; i++) q += (row[i] - m) * (row[i] - m); square = q / n; }
        const float by = (float)(1.0 / std::sqrt(square + eps));
        for (int i = 0; i < n; i++) row[i] = (row[i] - m) * by * gain[i] + (bias ? bias[i] : 0.f);
        if (out) narrow(row.data(), out + (int64_t)r * n, n);
        else {
            for (int i = 0; i < n; i++) row[i] = rounded(row[i], x);  // as the product would have seen it
            quantize(row.data(), n, small + (int64_t)r * n, scale + r);
        }
    }
}
extern "C" void gristmill_norm(void* x, const void* delta, const float* gain, const float* bias, void* out, int8_t* small, float* scale, int rows, int n,
                               float eps, int centred, int type) {
    if (type == 0) norm((float*)x, (const float*)delta, gain, bias, (float*)out, small, scale, rows, n, eps, centred);
    else norm((bf16*)x, (const bf16*)delta, gain, bias, (bf16*)out, small, scale, rows, n, eps, centred);
}

// relu(x)^2 in place.
extern "C" void gristmill_squared_relu(void* x, int64_t n, int type) {
    if (type == 0) { float* p = (float*)x; for (int64_t i = 0; i < n; i++) { float a = p[i] > 0 ? p[i] : 0; p[i] = a * a; } return; }
    bf16* p = (bf16*)x;
    int64_t i = 0;
    for (; i + VL <= n; i += VL) { vec a = load(p + i); a = a > 0 ? a : vec{}; store(p + i, a * a); }
    for (; i < n; i++) { float a = get(p + i); a = a > 0 ? a : 0; put(p + i, a * a); }
}

// Rows of activations to int8 with a scale a row.
extern "C" void gristmill_quantize(const void* x, int8_t* out, float* scale, int rows, int n, int type) {
    std::vector<float> row(n);
    for (int r = 0; r < rows; r++) {
        if (type == 0) widen((const float*)x + (int64_t)r * n, row.data(), n);
        else widen((const bf16*)x + (int64_t)r * n, row.data(), n);
        quantize(row.data(), n, out + (int64_t)r * n, scale + r);
    }
}

// An int32 product back to numbers, row scale times column scale: into out, or squared, cut below 0 and quantized anew where out is null.
extern "C" void gristmill_dequantize(const int32_t* product, const float* row_scale, const float* column_scale, const float* bias, void* out, int8_t* small,
                                     float* scale, int rows, int n, int type) {
    std::vector<float> row(n);
    for (int r = 0; r < rows; r++) {
        const int32_t* p = product + (int64_t)r * n;
        const float by = row_scale[r];
        for (int i = 0; i < n; i++) row[i] = (float)p[i] * by * column_scale[i];
        if (bias) for (int i = 0; i < n; i++) row[i] += bias[i];
        if (!out) {
            for (int i = 0; i < n; i++) { float a = row[i] > 0 ? row[i] : 0; row[i] = a * a; }
            quantize(row.data(), n, small + (int64_t)r * n, scale + r);
        } else if (type == 0) memcpy((float*)out + (int64_t)r * n, row.data(), n * sizeof(float));
        else narrow(row.data(), (bf16*)out + (int64_t)r * n, n);
    }
}

// One token a row by inverting the cumulative distribution at u, and its log-probability; temperature 0 takes the likeliest. Logits float32.
extern "C" void gristmill_sample(const float* logits, const float* u, const float* temperature, int64_t* tokens, float* logprobs, int rows, int n) {
    const int blocks = (n + 255) / 256;
    std::vector<float> e(n + VL), sums(blocks);
    for (int r = 0; r < rows; r++) {
        const float* p = logits + (int64_t)r * n;
        vec m16 = vec{} - INFINITY;
        int i = 0;
        for (; i + VL <= n; i += VL) { vec v = load(p + i); m16 = v > m16 ? v : m16; }
        float m = max_of(m16);
        for (; i < n; i++) m = p[i] > m ? p[i] : m;
        double plain = 0, drawn = 0;
        const float t = temperature[r], by = t > 0 ? 1.f / t : 0.f;
        int best = -1;
        for (int b = 0; b < blocks; b++) {
            const int from = b * 256, to = from + 256 < n ? from + 256 : n;
            vec one[PARTS] = {}, other[PARTS] = {};
            int j = from;
            for (; j + VL <= to; j += VL) {
                vec v = load(p + j) - m, w = exp_(v);
                one[j / VL % PARTS] += w;
                if (t > 0) { if (t != 1) w = exp_(v * by); *(vec*)(e.data() + j) = w; other[j / VL % PARTS] += w; }
            }
            float s = sum_of(one), d = sum_of(other);
            for (; j < to; j++) { float w = std::exp(p[j] - m); s += w; if (t > 0) { if (t != 1) w = std::exp((p[j] - m) * by); e[j] = w; d += w; } }
            plain += s; drawn += d; sums[b] = d;
            if (!(t > 0) && best < 0) for (int k = from; k < to; k++) if (p[k] == m) { best = k; break; }
        }
        if (t > 0) {
            double left = u[r] * drawn;
            int b = 0;
            while (b < blocks - 1 && left >= sums[b]) left -= sums[b++];
            const int to = b * 256 + 256 < n ? b * 256 + 256 : n;
            best = -1;
            int last = -1;
            for (int k = b * 256; k < to; k++) { if (e[k] > 0) last = k; left -= e[k]; if (left < 0 && e[k] > 0) { best = k; break; } }
            if (best < 0) best = last;  // the sums of a block and of its parts differ in the last digits
            if (best < 0) for (int k = 0; k < n; k++) if (p[k] == m) { best = k; break; }
        }
        if (best < 0) best = 0;  // logits that are no numbers
        tokens[r] = best;
        logprobs[r] = p[best] - m - (float)std::log(plain);
    }
}
