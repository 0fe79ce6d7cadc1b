// Variable-length causal attention in bf16 by tile products (AMX), forward and backward, with the rotation inside. Sums are float32;
// probabilities and the gradients of scores are rounded to bf16 before they are multiplied, as flash attention on GPUs does.

#include "attention.h"
#include "tiles.h"

#ifdef TILES

static const int ROWS = 128;     // rows of scores made at once
static const int KEYS = 64;      // keys that go through the backward pass at once
static const float HIDDEN = -1e30f;

// Rows [TILE, e] of numbers that lie as columns: x [e, m].
static void tile_rows(const float* x, int m, int e, float* out) {
    for (int i = 0; i < e; i += TILE) {
        __m512i part[TILE];
        for (int k = 0; k < TILE; k++) part[k] = _mm512_loadu_si512(x + (int64_t)(i + k) * m);
        transpose(part);
        for (int r = 0; r < TILE; r++) _mm512_storeu_si512(out + r * e + i, part[r]);
    }
}

static vec dot(const bf16* x, const bf16* y, int d) {
    vec sum = {};
    for (int i = 0; i < d; i += VL) sum += some(x + i, d - i) * some(y + i, d - i);
    return sum;
}

// ---- attention ----

// bf16 memory inside of a Scratch.
static bf16* take(Scratch& scratch, size_t count) { return (bf16*)scratch.take((count + 1) / 2); }

// Sizes of one document and key head: e numbers of a head, n keys and m rows, all padded.
struct Sizes {
    int G, e, n, m;
    int64_t row;  // of qkv
    Sizes(const Attention& a, const Document& x)
        : G(a.heads / a.kv_heads), e(padded(a.head_dim, DEPTH)), n(padded(x.n, KEYS)), m(padded(x.rows, ROWS)), row((int64_t)(a.heads + 2 * a.kv_heads) * a.head_dim) {}
};

// Rotated keys and values as rows [n, e], padded with zeros.
static void read_keys(const Attention& a, const Document& x, const Sizes& s, int h, const bf16* qkv, bf16* k, bf16* v) {
    memset(k, 0, (size_t)s.n * s.e * sizeof(bf16));
    memset(v, 0, (size_t)s.n * s.e * sizeof(bf16));
    for (int j = 0; j < x.n; j++) {
        const int64_t t = x.token(j);
        const bf16* from = qkv + t * s.row + (int64_t)(h * (s.G + 2) + s.G) * a.head_dim;
        rotated(from, k + (int64_t)j * s.e, a.head_dim, a.pairs, a.cos + t * a.pairs, a.sin + t * a.pairs, 1.f, 1.f);
        memcpy(v + (int64_t)j * s.e, from + a.head_dim, a.head_dim * sizeof(bf16));
    }
}

// Rotated queries as rows [m, e].
static void read_queries(const Attention& a, const Document& x, const Sizes& s, int h, const bf16* qkv, bf16* q) {
    memset(q, 0, (size_t)s.m * s.e * sizeof(bf16));
    for (int r = 0; r < x.rows; r++) {
        const int64_t t = x.start + r / s.G;
        rotated(qkv + t * s.row + (int64_t)(h * (s.G + 2) + r % s.G) * a.head_dim, q + (int64_t)r * s.e, a.head_dim, a.pairs, a.cos + t * a.pairs, a.sin + t * a.pairs, 1.f, 1.f);
    }
}

static int64_t head_of(const Attention& a, const Document& x, int G, int h, int r) { return (x.start + r / G) * (int64_t)a.heads + h * G + r % G; }

static void forward(const Attention& a, const Document& x, int h, const bf16* qkv, bf16* out, float* lse, Scratch& scratch) {
    const Sizes s(a, x);
    const int d = a.head_dim, e = s.e;
    const size_t keys_e = (size_t)s.n * e;
    scratch.reset(2 * keys_e + (size_t)s.m * e / 2 + (size_t)ROWS * s.n * 3 / 2 + (size_t)ROWS * e);
    bf16 *k = take(scratch, keys_e), *v = take(scratch, keys_e), *kt = take(scratch, keys_e), *vt = take(scratch, keys_e);
    bf16 *q = take(scratch, (size_t)s.m * e), *p = take(scratch, (size_t)ROWS * s.n);
    float *scores = scratch.take((size_t)ROWS * s.n), *result = scratch.take((size_t)ROWS * e), tops[ROWS], totals[ROWS];
    read_keys(a, x, s, h, qkv, k, v);
    read_queries(a, x, s, h, qkv, q);
    pair_columns(k, s.n, e, kt);
    pair_rows(v, e, s.n, e, vt);
    for (int start = 0; start < x.rows; start += ROWS) {
        const int count = x.rows - start < ROWS ? x.rows - start : ROWS, tiles = padded(count, 2 * TILE);
        const int end = x.shared + (start + count - 1) / s.G + 1, earliest = x.shared + start / s.G + 1 - a.window;
        const int base = a.window && earliest > 0 ? earliest / DEPTH * DEPTH : 0, seen = padded(end - base, DEPTH);
        product(tiles, seen, e / DEPTH, q + (int64_t)start * e, e, kt + (int64_t)base * e, (int64_t)e * TILE, WORDS, scores, s.n, false);
        for (int r = 0; r < count; r++) {
            float* y = scores + (int64_t)r * s.n;
            bf16* to_p = p + (int64_t)r * s.n;
            const int to = x.shared + (start + r) / s.G + 1 - base, from = a.window && to > a.window ? to - a.window : 0;
            const int rest = padded(to, VL), some = rest < seen ? rest : seen;  // keys behind are hidden
            vec top = vec{} + HIDDEN, sum = {};
            const ivec place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            for (int j = 0; j < some; j += VL) {
                vec score = load(y + j) * a.scale;
                if (a.cap > 0) score = a.cap * tanh_(score * (1.f / a.cap));
                if (j < from || j + VL > to) score = (place + j < from) | (place + j >= to) ? vec{} + HIDDEN : score;
                store(y + j, score);
                top = score > top ? score : top;
            }
            const float m = tops[r] = max_of(top);
            for (int j = 0; j < some; j += VL) { const vec part = exp_(load(y + j) - m); sum += part; store(to_p + j, part); }
            memset(to_p + some, 0, (seen - some) * sizeof(bf16));
            totals[r] = sum_of(sum);
        }
        for (int r = 0; r < count; r += VL) {
            const vec log_sums = load(tops + r) + log_(load(totals + r));
            store(totals + r, 1.f / load(totals + r));
            for (int i = 0; lse && i < VL && r + i < count; i++) lse[head_of(a, x, s.G, h, start + r + i)] = log_sums[i];
        }
        memset(p + (int64_t)count * s.n, 0, (size_t)(tiles - count) * s.n * sizeof(bf16));
        product(tiles, e, seen / DEPTH, p, s.n, vt + (int64_t)base * e, WORDS, (int64_t)e * DEPTH, result, e, false);
        for (int r = 0; r < count; r++)
            for (int i = 0; i < d; i += VL)
                keep(out + head_of(a, x, s.G, h, start + r) * d + i, load(result + (int64_t)r * e + i) * totals[r], d - i);
    }
}

// Probabilities and the gradients of scores [KEYS, count] of keys from `at` on and rows from `start` on, in place of scores and of the
// gradients of probabilities; p and ds get them as rows, and ds_pairs as pairs of rows.
struct Part { int at, start, count, shared, G; };
static void differentiate(const Attention& a, const Part& b, const float* sums, const float* delta, const int* last, const float* scores, const float* grads, bf16* p, bf16* ds,
                          bf16* ds_pairs) {
    const float by = a.cap > 0 ? 1.f / a.cap : 0.f;
    for (int j = 0; j < KEYS; j += 2) {
        const int first = (b.at + j - b.shared) * b.G - b.start, hidden_rows = first <= 0 ? 0 : first < b.count ? first / VL * VL : b.count;
        for (bf16* to : {p, ds}) for (int i = 0; i < 2; i++) memset(to + (j + i) * ROWS, 0, hidden_rows * sizeof(bf16));
        bf16* pairs = ds_pairs + j / DEPTH * WORDS + j % DEPTH * TILE;  // of tiles [count / TILE, KEYS / DEPTH]
        for (int r = 0; r < hidden_rows; r += VL) memset(pairs + r / TILE * (KEYS / DEPTH) * WORDS, 0, 2 * TILE * sizeof(bf16));
        for (int r = hidden_rows; r < b.count; r += VL) {
            const vec sum = load(sums + b.start + r), centre = load(delta + b.start + r);
            ivec latest;
            memcpy(&latest, last + b.start + r, sizeof latest);
            uvec pair = {};
            for (int i = 0; i < 2; i++) {
                const int key = b.at + j + i, place = (j + i) * ROWS + r;
                vec score = load(scores + place) * a.scale, slope = vec{} + 1.f;
                if (a.cap > 0) { const vec t = tanh_(score * by); score = a.cap * t; slope = 1.f - t * t; }
                ivec hidden = latest < key;
                if (a.window) hidden |= latest - a.window >= key;
                const vec y = exp_(hidden ? vec{} + HIDDEN : score - sum), gradient = hidden ? vec{} : y * (load(grads + place) - centre) * slope;
                store(p + place, y);
                const uvec bits = rounded_bits(gradient);
                *(hvec*)(ds + place) = low(bits >> 16);
                pair |= i ? bits & 0xffff0000u : bits >> 16;
            }
            memcpy(pairs + r / TILE * (KEYS / DEPTH) * WORDS, &pair, sizeof pair);
        }
    }
}

static void backward(const Attention& a, const Document& x, int h, const bf16* qkv, const bf16* out, const float* lse, const bf16* grad, float* grad_qkv, Scratch& scratch) {
    const Sizes s(a, x);
    const int d = a.head_dim, e = s.e, G = s.G;
    const size_t keys_e = (size_t)s.n * e, rows_e = (size_t)s.m * e;
    scratch.reset(3 * keys_e / 2 + 3 * rows_e + 2 * keys_e + rows_e + 3 * (size_t)s.m + 2 * KEYS * ROWS + 3 * KEYS * ROWS / 2 + (TILE + 1) * e);
    bf16 *k = take(scratch, keys_e), *v = take(scratch, keys_e), *k_columns = take(scratch, keys_e);
    bf16 *q = take(scratch, rows_e), *go = take(scratch, rows_e), *q_columns = take(scratch, rows_e), *go_columns = take(scratch, rows_e);
    bf16 *q_rows = take(scratch, rows_e), *go_rows = take(scratch, rows_e);
    float *dk = scratch.take(keys_e), *dv = scratch.take(keys_e), *dq = scratch.take(rows_e);  // dq [e, m]
    float *delta = scratch.take(s.m), *sums = scratch.take(s.m), *scores = scratch.take(KEYS * ROWS), *grads = scratch.take(KEYS * ROWS);
    int* last = (int*)scratch.take(s.m);  // key that a row sees
    bf16 *p = take(scratch, KEYS * ROWS), *ds = take(scratch, KEYS * ROWS), *ds_pairs = take(scratch, KEYS * ROWS);
    float *one = scratch.take(e), *some_dq = scratch.take(TILE * e);
    read_keys(a, x, s, h, qkv, k, v);
    read_queries(a, x, s, h, qkv, q);
    columns(k, e, s.n, e, k_columns, s.n);
    memset(go, 0, rows_e * sizeof(bf16));
    memset(dk, 0, 2 * keys_e * sizeof(float));
    memset(dq, 0, rows_e * sizeof(float));
    for (int r = 0; r < s.m; r++) {
        delta[r] = sums[r] = 0;
        last[r] = r < x.rows ? x.shared + r / G : -1;
        if (r >= x.rows) continue;
        const int64_t head = head_of(a, x, G, h, r);
        memcpy(go + (int64_t)r * e, grad + head * d, d * sizeof(bf16));
        delta[r] = _mm512_reduce_add_ps((__m512)dot(grad + head * d, out + head * d, d));
        sums[r] = lse[head];
    }
    pair_columns(q, s.m, e, q_columns);
    pair_columns(go, s.m, e, go_columns);
    pair_rows(q, e, s.m, e, q_rows);
    pair_rows(go, e, s.m, e, go_rows);
    for (int at = 0; at < x.n; at += KEYS) {
        const int earliest = at > x.shared ? at - x.shared : 0;  // own token that sees a key of these, and the one after the last
        const int latest = a.window && at + KEYS - 1 + a.window - x.shared < x.own ? at + KEYS - 1 + a.window - x.shared : x.own;
        for (int start = earliest * G / DEPTH * DEPTH; start < latest * G; start += ROWS) {
            const int rest = padded(latest * G - start, DEPTH), count = rest < ROWS ? rest : ROWS;
            const int64_t panel = (int64_t)e * TILE, from = (int64_t)start * e;
            product(KEYS, count, e / DEPTH, k + (int64_t)at * e, e, q_columns + from, panel, WORDS, scores, ROWS, false);
            product(KEYS, count, e / DEPTH, v + (int64_t)at * e, e, go_columns + from, panel, WORDS, grads, ROWS, false);
            differentiate(a, {at, start, count, x.shared, G}, sums, delta, last, scores, grads, p, ds, ds_pairs);
            product(KEYS, e, count / DEPTH, p, ROWS, go_rows + from, WORDS, (int64_t)e * DEPTH, dv + (int64_t)at * e, e, true);
            product(KEYS, e, count / DEPTH, ds, ROWS, q_rows + from, WORDS, (int64_t)e * DEPTH, dk + (int64_t)at * e, e, true);
            product(e, count, KEYS / DEPTH, k_columns + at, s.n, ds_pairs, KEYS / DEPTH * WORDS, WORDS, dq + start, s.m, true);
        }
    }
    for (int r = 0; r < x.rows; r++) {
        const int64_t t = x.start + r / G;
        if (r % TILE == 0) tile_rows(dq + r, s.m, e, some_dq);
        rotated(some_dq + r % TILE * e, grad_qkv + t * s.row + (int64_t)(h * (G + 2) + r % G) * d, d, a.pairs, a.cos + t * a.pairs, a.sin + t * a.pairs, -1.f, a.scale);
    }
    for (int j = 0; j < x.n; j++) {
        const int64_t t = x.token(j);
        float *to_k = grad_qkv + t * s.row + (int64_t)(h * (G + 2) + G) * d, *to_v = to_k + d;
        rotated(dk + (int64_t)j * e, one, d, a.pairs, a.cos + t * a.pairs, a.sin + t * a.pairs, -1.f, a.scale);
        const float *add_k = one, *add_v = dv + (int64_t)j * e;
        for (int i = 0; i < d; i += VL) {  // those of shared tokens are added to what their holder has put there already
            const bool adds = j < x.shared;
            keep(to_k + i, adds ? some(to_k + i, d - i) + load(add_k + i) : load(add_k + i), d - i);
            keep(to_v + i, adds ? some(to_v + i, d - i) + load(add_v + i) : load(add_v + i), d - i);
        }
    }
}

extern "C" void gristmill_amx_attention_forward(const Attention* a, const bf16* qkv, bf16* out, float* lse) {
    each(*a, [&](const Document& x, int h, Scratch& scratch) { Tiles tiles; forward(*a, x, h, qkv, out, lse, scratch); });
}
extern "C" void gristmill_amx_attention_backward(const Attention* a, const bf16* qkv, const bf16* out, const float* lse, const bf16* grad, float* grad_qkv) {
    each(*a, [&](const Document& x, int h, Scratch& scratch) { Tiles tiles; backward(*a, x, h, qkv, out, lse, grad, grad_qkv, scratch); });
}

#else

extern "C" void gristmill_amx_attention_forward(const Attention*, const bf16*, bf16*, float*) {}
extern "C" void gristmill_amx_attention_backward(const Attention*, const bf16*, const bf16*, const float*, const bf16*, float*) {}

#endif

extern "C" int gristmill_has_tiles() { return tiles_allowed(); }
