// Attention over paged keys and values for one layer of one step, on a CPU: rotates queries and keys, stores the step's keys and
// values in their pages, attends. Built by kernels.py without any header of torch; called through ctypes.
//
// A page holds BS positions of one layer: keys [K, d, BS] (transposed, so that vector lanes run along positions), values
// [K, BS, e] with e = d rounded up to whole vectors.
// Rows of a tile are (token, query head) pairs that read the same keys. Scores and sums are float32 whatever the type in memory.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef float f16 __attribute__((vector_size(64), aligned(4)));  // sixteen floats
typedef int i16 __attribute__((vector_size(64)));
typedef unsigned u16 __attribute__((vector_size(64)));
typedef unsigned short h16 __attribute__((vector_size(32), aligned(2)));
typedef uint16_t bf16;

static const int BS = 32, LANES = 16, WORDS = BS / LANES, MAX_ROWS = 8;

static inline f16 load(const float* p) { return *(const f16*)p; }
static inline f16 load(const bf16* p) { return (f16)(__builtin_convertvector(*(const h16*)p, u16) << 16); }
static inline float get(const float* p) { return *p; }
static inline float get(const bf16* p) { uint32_t u = (uint32_t)*p << 16; float x; memcpy(&x, &u, 4); return x; }
static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) {
    uint32_t u; memcpy(&u, &x, 4);
    *p = (x != x) ? 0x7fc0 : (bf16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline float rounded(float x, const float*) { return x; }
static inline float rounded(float x, const bf16*) { bf16 b; put(&b, x); return get(&b); }

// e^x for x <= 0, relative error below 4e-7: 2^n by the exponent bits, 2^f by a polynomial on [-1/2, 1/2].
static inline f16 exp_(f16 x) {
    x *= 1.44269504f;
    x = x < -126.f ? (f16{} - 126.f) : x;
    f16 n = __builtin_convertvector(__builtin_convertvector(x - 0.5f, i16), f16);  // truncation towards 0 rounds, since x <= 0
    f16 r = x - n;
    f16 y = 1.f + r * (0.6931471806f + r * (0.2402265070f + r * (0.0555041087f + r * (0.0096181291f + r * (0.0013333558f + r * 0.0001540353f)))));
    return y * (f16)((__builtin_convertvector(n, i16) + 127) << 23);
}

struct Layer { int64_t k_offset, v_offset; int32_t heads, kv_heads, head_dim, pairs; };  // offsets in elements from a page's begin
struct Step {
    int32_t num_seqs, table_stride, threads, unused;
    int64_t page_stride;                                 // elements between two pages in the pool
    const int32_t *begin, *length, *slot;                // of each sequence: first token of the step (n + 1 of them), positions with this step's
    const int32_t* table;                                // [slots, table_stride]
    const float *cos, *sin;                              // [positions, pairs]
};

template <typename A> static void rotate(const A* in, float* out, int d, int pairs, const float* cos, const float* sin) {
    for (int i = 0; i < pairs; i++) {
        float a = get(in + i), b = get(in + i + pairs);
        out[i] = rounded(a * cos[i] - b * sin[i], in);
        out[i + pairs] = rounded(b * cos[i] + a * sin[i], in);
    }
    for (int i = 2 * pairs; i < d; i++) out[i] = get(in + i);
}

// One tile: R rows over n keys of one head. q [R, d] is scaled; limit[r] is the number of keys that row r sees.
template <int R, typename C>
static void tile(const float* q, const C* pool, const int32_t* table, int64_t page_stride, int64_t k_at, int64_t v_at, int d, int e, int n,
                 const int* limit, float* scores, float* out) {
    const int pages = (n + BS - 1) / BS, width = pages * BS;
    const i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    f16 top[R];
    for (int r = 0; r < R; r++) top[r] = f16{} - 1e30f;
    for (int p = 0; p < pages; p++) {
        const C* k = pool + table[p] * page_stride + k_at;
        f16 acc[R][WORDS] = {};
        for (int i = 0; i < d; i++) {
            f16 key[WORDS];
            for (int w = 0; w < WORDS; w++) key[w] = load(k + i * BS + w * LANES);
            for (int r = 0; r < R; r++) for (int w = 0; w < WORDS; w++) acc[r][w] += q[r * d + i] * key[w];
        }
        for (int r = 0; r < R; r++) for (int w = 0; w < WORDS; w++) {
            i16 seen = lane + (p * BS + w * LANES) < limit[r];
            f16 s = seen ? acc[r][w] : (f16{} - 1e30f);
            top[r] = s > top[r] ? s : top[r];
            *(f16*)(scores + (int64_t)r * width + p * BS + w * LANES) = s;
        }
    }
    float inverse[R];
    for (int r = 0; r < R; r++) {
        float m = top[r][0];
        for (int j = 1; j < LANES; j++) m = top[r][j] > m ? top[r][j] : m;
        f16 sum = {};
        float* s = scores + (int64_t)r * width;
        for (int j = 0; j < width; j += LANES) { f16 e = exp_(load(s + j) - m); *(f16*)(s + j) = e; sum += e; }
        float total = 0;
        for (int j = 0; j < LANES; j++) total += sum[j];
        inverse[r] = 1.f / total;
    }
    for (int at = 0; at < e; at += 2 * LANES) {  // two words of the value at a time, so that the sums stay in registers
        const int words = e - at >= 2 * LANES ? 2 : 1;
        f16 acc[R][2] = {};
        for (int p = 0; p < pages; p++) {
            const C* v = pool + table[p] * page_stride + v_at + at;
            const int filled = n - p * BS < BS ? n - p * BS : BS;
            for (int t = 0; t < filled; t++) {
                f16 one = load(v + t * e), other = words == 2 ? load(v + t * e + LANES) : f16{};
                for (int r = 0; r < R; r++) {
                    float s = scores[(int64_t)r * width + p * BS + t];
                    acc[r][0] += s * one;
                    acc[r][1] += s * other;
                }
            }
        }
        for (int r = 0; r < R; r++) for (int w = 0; w < words; w++) *(f16*)(out + r * e + at + w * LANES) = acc[r][w] * inverse[r];
    }
}

// A: type of activations, C: type of the cache. qkv [T, H + 2K, d], out [T, H, d].
template <typename A, typename C> static void run(const Layer& l, const Step& s, const A* qkv, C* pool, A* out) {
    const int H = l.heads, K = l.kv_heads, d = l.head_dim, G = H / K, row = (H + 2 * K) * d, e = (d + LANES - 1) / LANES * LANES;
    const float scale = 1.f / std::sqrt((float)d);
    // All keys and values first: sequences of one step may share pages that one of them fills.
#pragma omp parallel for if (s.threads > 1) num_threads(s.threads) schedule(static)
    for (int i = 0; i < s.num_seqs; i++) {
        std::vector<float> key(d);
        const int count = s.begin[i + 1] - s.begin[i], first = s.length[i] - count;
        const int32_t* table = s.table + (int64_t)s.slot[i] * s.table_stride;
        for (int t = 0; t < count; t++) {
            const int position = first + t, at = position % BS;
            const A* token = qkv + (int64_t)(s.begin[i] + t) * row;
            C* page = pool + table[position / BS] * s.page_stride;
            for (int h = 0; h < K; h++) {
                rotate(token + (H + h) * d, key.data(), d, l.pairs, s.cos + (int64_t)position * l.pairs, s.sin + (int64_t)position * l.pairs);
                C* k = page + l.k_offset + (int64_t)h * d * BS + at;
                C* v = page + l.v_offset + ((int64_t)h * BS + at) * e;
                const A* value = token + (H + K + h) * d;
                for (int j = 0; j < d; j++) put(k + (int64_t)j * BS, key[j]);
                if (sizeof(A) == sizeof(C)) memcpy((void*)v, (const void*)value, d * sizeof(C));
                else for (int j = 0; j < d; j++) put(v + j, get(value + j));
            }
        }
    }
#pragma omp parallel if (s.threads > 1) num_threads(s.threads)
    {
        std::vector<float> q(MAX_ROWS * d), result(MAX_ROWS * e), scores;
#pragma omp for schedule(dynamic, 4)
        for (int i = 0; i < s.num_seqs; i++) {
            const int count = s.begin[i + 1] - s.begin[i], first = s.length[i] - count, rows = count * G;
            const int32_t* table = s.table + (int64_t)s.slot[i] * s.table_stride;
            const int64_t need = (int64_t)MAX_ROWS * ((s.length[i] + BS - 1) / BS * BS);
            if ((int64_t)scores.size() < need) scores.resize(need);
            for (int h = 0; h < K; h++) for (int start = 0; start < rows;) {
                const int left = rows - start, size = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
                int limit[MAX_ROWS];
                for (int r = 0; r < size; r++) {
                    const int t = (start + r) / G, g = (start + r) % G, position = first + t;
                    limit[r] = position + 1;
                    rotate(qkv + (int64_t)(s.begin[i] + t) * row + (h * G + g) * d, q.data() + r * d, d, l.pairs,
                           s.cos + (int64_t)position * l.pairs, s.sin + (int64_t)position * l.pairs);
                    for (int j = 0; j < d; j++) q[r * d + j] *= scale;
                }
                const int n = limit[size - 1];
                const int64_t k_at = l.k_offset + (int64_t)h * d * BS, v_at = l.v_offset + (int64_t)h * BS * e;
                switch (size) {
                    case 8: tile<8, C>(q.data(), pool, table, s.page_stride, k_at, v_at, d, e, n, limit, scores.data(), result.data()); break;
                    case 4: tile<4, C>(q.data(), pool, table, s.page_stride, k_at, v_at, d, e, n, limit, scores.data(), result.data()); break;
                    case 2: tile<2, C>(q.data(), pool, table, s.page_stride, k_at, v_at, d, e, n, limit, scores.data(), result.data()); break;
                    default: tile<1, C>(q.data(), pool, table, s.page_stride, k_at, v_at, d, e, n, limit, scores.data(), result.data());
                }
                for (int r = 0; r < size; r++) {
                    const int t = (start + r) / G, g = (start + r) % G;
                    A* to = out + ((int64_t)(s.begin[i] + t) * H + h * G + g) * d;
                    for (int j = 0; j < d; j++) put(to + j, result[r * e + j]);
                }
                start += size;
            }
        }
    }
}

extern "C" int gristmill_page_size() { return BS; }

// Types: 0 float32, 1 bfloat16.
extern "C" void gristmill_attend(const Layer* l, const Step* s, const void* qkv, int activations, void* pool, int cache, void* out) {
    if (activations == 0 && cache == 0) run(*l, *s, (const float*)qkv, (float*)pool, (float*)out);
    else if (activations == 0) run(*l, *s, (const float*)qkv, (bf16*)pool, (float*)out);
    else if (cache == 0) run(*l, *s, (const bf16*)qkv, (float*)pool, (bf16*)out);
    else run(*l, *s, (const bf16*)qkv, (bf16*)pool, (bf16*)out);
}
