// Tile products (AMX): 16 rows of 32 numbers in bf16 times 32 of 16, summed in float32. TILES says whether the compiler knows them.

#pragma once

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define TILES

#include <memory>
#include <sys/syscall.h>
#include <unistd.h>

static const int TILE = 16;   // rows of a tile, and float32 columns of a sum
static const int DEPTH = 32;  // bf16 numbers of a tile's row: what one instruction sums over
static const int WORDS = 512; // bf16 numbers of a tile

static inline int padded(int n, int to) { return (n + to - 1) / to * to; }

// Whether the system lets this process use them, once asked.
static inline bool tiles_allowed() {
    const int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, request, tile_data) == 0;
    return allowed;
}

struct Lines {  // bf16 numbers that begin with a line of the cache
    std::unique_ptr<bf16[]> memory;
    bf16* values;
    explicit Lines(int64_t n) : memory(new bf16[n + 32]), values((bf16*)(((uintptr_t)memory.get() + 63) & ~(uintptr_t)63)) {}
};

// Eight tiles of full size for this thread; those that it had before come back at the end.
struct Tiles {
    struct alignas(64) Palette { uint8_t palette = 1, start = 0, reserved[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; };
    alignas(64) uint8_t before[64];
    Tiles() {
        Palette full;
        for (int i = 0; i < 8; i++) { full.bytes[i] = 64; full.rows[i] = TILE; }
        _tile_storeconfig(before);
        _tile_loadconfig(&full);
    }
    ~Tiles() { before[0] ? _tile_loadconfig(before) : _tile_release(); }
};

static inline void transpose(__m512i x[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) { y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]); y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]); }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 16; j += 8) {
            y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0x88);
            y[i + j + 4] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    }
}

// The right side of a product holds pairs of numbers that are summed side by side. Here pairs of columns of x [n, e], for sums over them:
// tiles [n / TILE, e / DEPTH].
static inline void pair_columns(const bf16* x, int n, int e, bf16* tiles) {
    for (int p = 0; p < n; p += TILE)
        for (int k = 0; k < e; k += DEPTH, tiles += WORDS) {
            __m512i rows[TILE];
            for (int r = 0; r < TILE; r++) rows[r] = _mm512_loadu_si512(x + (int64_t)(p + r) * e + k);
            transpose(rows);
            for (int i = 0; i < TILE; i++) _mm512_storeu_si512(tiles + i * DEPTH, rows[i]);
        }
}

// Tiles 0 to 3 += two rows of tiles of A times two columns of tiles of B, over all depths.
static inline void accumulate(int depths, const bf16* a, int64_t lda, const bf16* b, int64_t panel, int64_t step) {
    const bf16 *a1 = a + TILE * lda, *b1 = b + panel;
    for (int k = 0; k < depths; k++) {
        _tile_loadd(4, a + k * DEPTH, lda * 2); _tile_loadd(6, b + k * step, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b1 + k * step, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a1 + k * DEPTH, lda * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// C [m, n] = or += A [m, depths * DEPTH] B, all of them multiples of 32. Tiles of B are `panel` numbers apart from one column of tiles to the
// next, and `step` from one row to the next.
static inline void product(int m, int n, int depths, const bf16* a, int64_t lda, const bf16* b, int64_t panel, int64_t step, float* c, int64_t ldc, bool add) {
    for (int j = 0; j < n; j += 2 * TILE)
        for (int i = 0; i < m; i += 2 * TILE) {
            float *c0 = c + (int64_t)i * ldc + j, *c1 = c0 + TILE * ldc;
            if (add) {
                _tile_loadd(0, c0, ldc * 4); _tile_loadd(1, c0 + TILE, ldc * 4);
                _tile_loadd(2, c1, ldc * 4); _tile_loadd(3, c1 + TILE, ldc * 4);
            } else {
                _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
            }
            accumulate(depths, a + (int64_t)i * lda, lda, b + j / TILE * panel, panel, step);
            _tile_stored(0, c0, ldc * 4); _tile_stored(1, c0 + TILE, ldc * 4);
            _tile_stored(2, c1, ldc * 4); _tile_stored(3, c1 + TILE, ldc * 4);
        }
}

// Pairs of rows of x [n, e], `stride` apart, for the right side of a product that sums over them: tiles [n / DEPTH, e / TILE].
static inline void pair_rows(const bf16* x, int64_t stride, int n, int e, bf16* tiles) {
    for (int r = 0; r < n; r += DEPTH)
        for (int p = 0; p < e; p += TILE)
            for (int i = 0; i < TILE; i++, tiles += 2 * TILE) {
                const bf16 *first = x + (r + 2 * i) * stride + p, *second = first + stride;
                const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)first));
                const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)second));
                _mm512_storeu_si512(tiles, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
}

// Columns of x [n, e], whose rows are `stride` apart, as rows [e, n], `to_stride` apart.
static inline void columns(const bf16* x, int64_t stride, int n, int e, bf16* out, int64_t to_stride) {
    for (int p = 0; p < n; p += TILE)
        for (int k = 0; k < e; k += DEPTH) {
            __m512i rows[TILE];
            for (int r = 0; r < TILE; r++) rows[r] = _mm512_loadu_si512(x + (p + r) * stride + k);
            transpose(rows);
            for (int i = 0; i < TILE; i++) {
                bf16* to = out + (k + 2 * i) * to_stride + p;
                _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(rows[i]));
                _mm256_storeu_si256((__m256i*)(to + to_stride), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rows[i], 16)));
            }
        }
}
#else
static inline bool tiles_allowed() { return false; }
#endif
