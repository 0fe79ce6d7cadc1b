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
#else
static inline bool tiles_allowed() { return false; }
#endif
