// Matrix products in bf16 by tiles (AMX), for CPUs that have them: activations [T, D] with a matrix [N, D] as it lies in memory, in bf16, int8 or
// int4. The matrix is on the left, out^T = matrix x^T, so that only the activations are laid out anew; integers become bf16 a few rows at a
// time, exactly in int8, whose scales come last.

#include "kernels.h"
#include "tiles.h"

#ifdef TILES

static const int BLOCK = 2 * TILE;                // rows of the matrix that pass all activations together
static const int MOST_BYTES = 1 << 20;            // of activations that they pass, which are to stay in the cache
static const int AHEAD = 1024;                    // bytes of integers that are fetched before they are due
static const int64_t MIN_SHARED = 1 << 18;        // products of numbers that are worth another thread

// Sums of BLOCK rows of the matrix with 2 * TILE rows of activations, or TILE of them, as [row of the matrix, row of activations].
template <bool BOTH> static inline void multiply(const bf16* w, int64_t stride, const bf16* x, int64_t panel, int depths, float (*sums)[TILE][TILE]) {
    _tile_zero(0); _tile_zero(1);
    if (BOTH) { _tile_zero(2); _tile_zero(3); }
    for (int k = 0; k < depths; k++) {
        if (!BOTH) for (int i = 0; i < BLOCK; i++) __builtin_prefetch(w + i * stride + (k + 6) * DEPTH);
        _tile_loadd(4, w + k * DEPTH, stride * 2);
        _tile_loadd(6, x + (int64_t)k * WORDS, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, w + TILE * stride + k * DEPTH, stride * 2);
        _tile_dpbf16ps(1, 5, 6);
        if (BOTH) {
            _tile_loadd(7, x + panel + (int64_t)k * WORDS, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], TILE * 4); _tile_stored(1, sums[1], TILE * 4);
    if (BOTH) { _tile_stored(2, sums[2], TILE * 4); _tile_stored(3, sums[3], TILE * 4); }
}

// The two bytes of the sizes of int8 numbers in bf16, which are exact.
struct Int8Bytes {
    alignas(64) uint8_t low[128], high[128];
    Int8Bytes() { for (int i = 0; i < 128; i++) { bf16 x; put(&x, (float)i); low[i] = (uint8_t)x; high[i] = (uint8_t)(x >> 8); } }
};

static inline void expand_int8(const int8_t* row, int d, int e, bf16* to) {
    static const Int8Bytes bytes;
    const __m512i low0 = _mm512_load_si512(bytes.low), low1 = _mm512_load_si512(bytes.low + 64), high0 = _mm512_load_si512(bytes.high),
                  high1 = _mm512_load_si512(bytes.high + 64), halves = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // as they are unpacked
    for (int k = 0; k < e; k += 2 * DEPTH) {
        __builtin_prefetch(row + k + AHEAD);
        const __mmask64 there = d - k < 64 ? (1ull << (d - k)) - 1 : ~0ull;
        const __m512i x = _mm512_permutexvar_epi64(halves, _mm512_maskz_loadu_epi8(there, row + k)), size = _mm512_abs_epi8(x);
        const __m512i low = _mm512_permutex2var_epi8(low0, size, low1), sign = _mm512_and_si512(x, _mm512_set1_epi8((char)0x80));
        const __m512i high = _mm512_or_si512(_mm512_permutex2var_epi8(high0, size, high1), sign);
        _mm512_storeu_si512(to + k, _mm512_unpacklo_epi8(low, high));
        if (k + DEPTH < e) _mm512_storeu_si512(to + k + DEPTH, _mm512_unpackhi_epi8(low, high));
    }
}

// DEPTH int4 numbers of one scale, a byte each: looked up among the sixteen that there are.
static inline void expand_int4(__m256i raised, bf16 scale, bf16* to) {
    const __m512 all = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m256bh values = _mm512_cvtneps_pbh(_mm512_mul_ps(all, _mm512_set1_ps(get(&scale))));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(raised), _mm512_castsi256_si512((__m256i)values)));
}

// Rows of the matrix in bf16, as long as whole tiles; as linear.cpp reads integers.
static inline void expand(const Product& p, int from, int count, int e, bf16* to) {
    for (int i = 0; i < count; i++, to += e) {
        const int64_t n = from + i;
        if (p.kind == 1) {
            memcpy(to, (const bf16*)p.weight + n * p.d, p.d * sizeof(bf16));
            memset(to + p.d, 0, (e - p.d) * sizeof(bf16));
        } else if (p.kind == 2) {
            expand_int8((const int8_t*)p.weight + n * padded(p.d, 16), p.d, e, to);
        } else {
            const __m256i mask = _mm256_set1_epi8(15);
            const uint8_t* row = (const uint8_t*)p.weight + n * (padded(p.d, 2 * DEPTH) / 2);
            const bf16* scales = (const bf16*)p.scale + n * (padded(p.d, 8 * DEPTH) / DEPTH);
            for (int b = 0; b < e / DEPTH; b += 2) {
                __builtin_prefetch(row + b / 2 * DEPTH + AHEAD);
                const __m256i both = _mm256_loadu_si256((const __m256i*)(row + b / 2 * DEPTH));
                expand_int4(_mm256_and_si256(both, mask), scales[b], to + b * DEPTH);
                if ((b + 1) * DEPTH < e) expand_int4(_mm256_and_si256(_mm256_srli_epi16(both, 4), mask), scales[b + 1], to + (b + 1) * DEPTH);
            }
        }
    }
}

// Sums of TILE rows of the matrix into rows of the output.
static inline void write(const float (*sums)[TILE], int count, int columns, const float* scale, const float* bias, bf16* out, int64_t stride) {
    __m512i rows[TILE];
    for (int i = 0; i < TILE; i++) rows[i] = _mm512_loadu_si512(sums[i]);
    transpose(rows);
    const vec by = scale ? some(scale, columns) : vec{} + 1, more = bias ? some(bias, columns) : vec{};
    for (int r = 0; r < count; r++) keep(out + r * stride, (vec)rows[r] * by + more, columns);
}

bool tile_product(const Product& p) {
    if (!tiles_allowed()) return false;
    const bf16* x = (const bf16*)p.x;
    const float* scale = p.kind == 2 ? (const float*)p.scale : nullptr;
    bf16* out = (bf16*)p.out;
    const int e = padded(p.d, DEPTH), depths = e / DEPTH, fit = MOST_BYTES / (2 * e) / BLOCK * BLOCK, most = fit < BLOCK ? BLOCK : fit;
    const int held = p.rows < most ? padded(p.rows, TILE) : most, blocks = (p.n + BLOCK - 1) / BLOCK;
    const int64_t panel = (int64_t)e * TILE;
    const Lines pairs((int64_t)held * e);
#pragma omp parallel if (p.threads > 1 && (int64_t)p.rows * p.n * p.d >= MIN_SHARED) num_threads(p.threads)
    {
        const Tiles tiles;
        const Lines whole((int64_t)BLOCK * e);  // rows of activations or of the matrix with zeros behind
        alignas(64) float sums[4][TILE][TILE];
        for (int start = 0; start < p.rows; start += most) {
            const int count = p.rows - start < most ? p.rows - start : most;
#pragma omp for schedule(static)
            for (int r = 0; r < count; r += TILE) {
                const int some_rows = count - r < TILE ? count - r : TILE;
                const bf16* rows = x + (int64_t)(start + r) * p.d;
                if (some_rows < TILE || p.d < e) {
                    memset(whole.values, 0, (size_t)TILE * e * sizeof(bf16));
                    for (int i = 0; i < some_rows; i++) memcpy(whole.values + (int64_t)i * e, rows + (int64_t)i * p.d, p.d * sizeof(bf16));
                    rows = whole.values;
                }
                pair_columns(rows, TILE, e, pairs.values + r / TILE * panel);
            }
#pragma omp for schedule(static)
            for (int b = 0; b < blocks; b++) {
                const int from = b * BLOCK, columns = p.n - from < BLOCK ? p.n - from : BLOCK;
                const bf16* w = (const bf16*)p.weight + (int64_t)from * p.d;
                if (p.kind != 1 || columns < BLOCK || p.d < e) {
                    expand(p, from, columns, e, whole.values);
                    memset(whole.values + (int64_t)columns * e, 0, (size_t)(BLOCK - columns) * e * sizeof(bf16));
                    w = whole.values;
                }
                for (int r = 0; r < count; r += BLOCK) {
                    const bool both = count - r > TILE;
                    (both ? multiply<true> : multiply<false>)(w, e, pairs.values + r / TILE * panel, panel, depths, sums);
                    for (int half = 0; half < (both ? 2 : 1); half++) for (int part = 0; part * TILE < columns; part++) {
                        const int at = from + part * TILE, first = r + half * TILE;
                        write(sums[2 * half + part], count - first < TILE ? count - first : TILE, p.n - at < TILE ? p.n - at : TILE, scale ? scale + at : nullptr,
                              p.bias ? p.bias + at : nullptr, out + (int64_t)(start + first) * p.n + at, p.n);
                    }
                }
            }
        }
    }
    return true;
}

#else
bool tile_product(const Product&) { return false; }
#endif

extern "C" int gristmill_has_tiles() { return tiles_allowed(); }
