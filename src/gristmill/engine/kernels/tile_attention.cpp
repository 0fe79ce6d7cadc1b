// Attention of the tokens of a prompt by tile products (AMX), for bf16 activations and a bf16 cache; kernels.cpp says how that lies. Scores
// and sums are float32; shares of a softmax are rounded to bf16 before they weigh values. A row does not depend on the others beside it.

#include "kernels.h"
#include "tiles.h"

#ifdef TILES

static const int BS = 32;  // positions of a block, as in kernels.cpp

// Numbers of two rows side by side: the right side of a product holds pairs that are summed.
static inline void pair_rows(__m512i even, __m512i odd, bf16* first, bf16* second) {
    static const uint16_t sides[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_loadu_si512(sides);
    _mm512_store_si512(first, _mm512_permutex2var_epi16(even, low, odd));
    if (second) _mm512_store_si512(second, _mm512_permutex2var_epi16(even, _mm512_add_epi16(low, _mm512_set1_epi16(16)), odd));
}

// Keys [d, BS] of a block as tiles [2, depths], a tile for TILE positions.
static inline void pair_keys(const bf16* k, int d, int depths, bf16* to) {
    const __m512i none = _mm512_setzero_si512();
    for (int i = 0; i < depths * DEPTH; i += 2) {
        bf16* first = to + i / DEPTH * WORDS + i % DEPTH / 2 * DEPTH;
        const __m512i even = i < d ? _mm512_loadu_si512(k + i * BS) : none, odd = i + 1 < d ? _mm512_loadu_si512(k + (i + 1) * BS) : none;
        pair_rows(even, odd, first, first + depths * WORDS);
    }
}

// The first `filled` values [BS, e] of a block as tiles [e / TILE], with zeros for the rest.
static inline void pair_values(const bf16* v, int filled, int e, bf16* to) {
    for (int c = 0; c < e; c += 2 * TILE) {
        const __mmask32 there = e - c < 2 * TILE ? 0xffff : ~0u;
        for (int i = 0; i < BS; i += 2) {
            const __m512i even = _mm512_maskz_loadu_epi16(i < filled ? there : 0, v + i * e + c), odd = _mm512_maskz_loadu_epi16(i + 1 < filled ? there : 0, v + (i + 1) * e + c);
            bf16* first = to + c / TILE * WORDS + i / 2 * DEPTH;
            pair_rows(even, odd, first, c + TILE < e ? first + WORDS : nullptr);
        }
    }
}

// Softmax of a row of `width` scores over those from `from` up to `limit`, before it is divided by the sum, which is returned.
static inline float softmax(float* scores, int width, int from, int limit, float scale, float cap, bf16* shares) {
    const int end = padded(limit, VL);
    ivec lane;
    for (int j = 0; j < VL; j++) lane[j] = j;
    vec top = vec{} - 1e30f, sum = {};
    for (int i = 0; i < end; i += VL) {
        vec x = load(scores + i) * scale;
        if (cap > 0) x = cap * tanh_(x * (1.f / cap));
        if (i < from || i + VL > limit) x = (lane + i >= from) & (lane + i < limit) ? x : (vec{} - 1e30f);
        top = x > top ? x : top;
        store(scores + i, x);
    }
    const float most = max_of(top);
    for (int i = 0; i < end; i += VL) {
        const vec x = exp_(load(scores + i) - most);
        sum += x;
        store(shares + i, x);
    }
    for (int i = end; i < width; i += VL) store(shares + i, vec{});
    return _mm512_reduce_add_ps((__m512)sum);
}

void tile_attend(const Queries& q, const void* cache, bf16* out, int64_t stride) {
    const Tiles tiles;
    const int depths = padded(q.d, DEPTH) / DEPTH, e = padded(q.d, TILE), columns = e / TILE, width_q = depths * DEPTH;
    const int keys = q.first + (q.rows - 1) / q.group + 1, blocks = (keys + BS - 1) / BS;
    const auto seen_from = [&](int position) { return q.window && position >= q.window ? position + 1 - q.window : 0; };
    const int before = seen_from(q.first) / BS, held = (blocks - before) * BS;  // blocks before all windows are left out
    const int64_t key_words = 2 * depths * WORDS, value_words = (int64_t)columns * WORDS;
    const Lines paired_keys((blocks - before) * key_words), paired_values((blocks - before) * value_words), shares((int64_t)TILE * held), scores((int64_t)TILE * held * 2);
    for (int p = before; p < blocks; p++) {
        const bf16* block = (const bf16*)cache + q.table[p] * q.block_stride;
        pair_keys(block + q.k_at, q.d, depths, paired_keys.values + (p - before) * key_words);
        pair_values(block + q.v_at, keys - p * BS < BS ? keys - p * BS : BS, e, paired_values.values + (p - before) * value_words);
    }
    for (int start = 0; start < q.rows; start += TILE) {
        const int count = q.rows - start < TILE ? q.rows - start : TILE;
        const int begin = seen_from(q.first + start / q.group) / BS, end = (q.first + (start + count - 1) / q.group) / BS + 1, width = (end - begin) * BS;
        const bf16 *mine = q.q + (int64_t)start * width_q, *k = paired_keys.values + (begin - before) * key_words, *v = paired_values.values + (begin - before) * value_words;
        float* score = (float*)scores.values;
        for (int p = 0; p < end - begin; p++, k += key_words) {
            _tile_zero(0); _tile_zero(1);
            for (int i = 0; i < depths; i++) {
                _tile_loadd(4, mine + i * DEPTH, width_q * 2);
                _tile_loadd(5, k + i * WORDS, 64);
                _tile_loadd(6, k + (depths + i) * WORDS, 64);
                _tile_dpbf16ps(0, 4, 5);
                _tile_dpbf16ps(1, 4, 6);
            }
            _tile_stored(0, score + p * BS, width * 4); _tile_stored(1, score + p * BS + TILE, width * 4);
        }
        float sums[TILE];
        for (int r = 0; r < count; r++) {
            const int position = q.first + (start + r) / q.group, from = seen_from(position) - begin * BS;
            sums[r] = softmax(score + r * width, width, from, position + 1 - begin * BS, q.scale, q.cap, shares.values + r * width);
        }
        for (int c = 0; c < columns; c += 4) {
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
            for (int p = 0; p < end - begin; p++) {
                const bf16* value = v + p * value_words + c * WORDS;
                _tile_loadd(4, shares.values + p * BS, width * 2);
                _tile_loadd(5, value, 64);
                _tile_dpbf16ps(0, 4, 5);
                if (c + 1 < columns) { _tile_loadd(6, value + WORDS, 64); _tile_dpbf16ps(1, 4, 6); }
                if (c + 2 < columns) { _tile_loadd(7, value + 2 * WORDS, 64); _tile_dpbf16ps(2, 4, 7); }
                if (c + 3 < columns) { _tile_loadd(5, value + 3 * WORDS, 64); _tile_dpbf16ps(3, 4, 5); }
            }
            alignas(64) float found[4][TILE][TILE];
            _tile_stored(0, found[0], TILE * 4); _tile_stored(1, found[1], TILE * 4); _tile_stored(2, found[2], TILE * 4); _tile_stored(3, found[3], TILE * 4);
            for (int r = 0; r < count; r++) for (int j = 0; j < 4; j++) {
                const int at = (c + j) * TILE;
                if (at < q.d) keep(out + (start + r) / q.group * stride + (start + r) % q.group * q.d + at, load(found[j][r]) * (1.f / sums[r]), q.d - at);
            }
        }
    }
}

#else
void tile_attend(const Queries&, const void*, bf16*, int64_t) {}
#endif
