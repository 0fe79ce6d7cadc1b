// Decoder blocks in bf16 by tile products (AMX), all of them in one call forward and one backward: norms, products, attention, activations and
// residual adds, with the rounding that they have one by one. For models so small that calling them one by one takes as long as they do. Blocks
// may be of several sizes, and lack their attention or MLP.
//
// What lies between two attentions is done for a few rows at a time, so that they stay in the cache. Sizes are multiples of DEPTH, rows of ROWS:
// those behind the last token are padding, whose gradients are zero.

#include "attention.h"
#include "tiles.h"

struct Weight {
    const bf16 *columns, *rows;  // tiles for x W^T and for x W; none in a block without this matrix
    float* grad;                 // null where none is due
    int64_t adds;                // whether it is added to what is there
};
struct Norm {
    const float *gain, *bias;
    float *grad_gain, *grad_bias;
    int64_t adds;
    float eps;
    int32_t centred;
};
struct Layer {
    Norm attention_norm, mlp_norm;
    Weight qkv, output, gate, up, down;  // without a gate the up is called so
    const Attention* attention;          // null without attention
    bf16* states;                        // [tokens, D]: where what it gives goes besides; null for nowhere
    const bf16* grad_states;             // the gradient of that; null for none
    int64_t ffn;                         // 0 without an MLP
};
struct Blocks {
    const Layer* layers;
    const int64_t* picked;  // tokens that the last block goes on with behind its attention; null for all
    int32_t num_blocks, tokens, num_picked, hidden, activation, keeps, threads;  // keeps: for the backward pass
};

#ifdef TILES

#include <memory>

extern "C" {
void gristmill_norm_forward(const void* x, const void* delta, const float* gain, const float* bias, void* sum, void* out, float* statistics, int rows, int n, float eps,
                            int centred, int type, int threads);
void gristmill_norm_backward(const void* grad, const void* grad_sum, const void* x, const float* gain, const float* statistics, void* grad_x, float* grad_gain,
                             float* grad_bias, int rows, int n, int centred, int type, int threads);
void gristmill_activate(const void* gate, const void* up, void* out, const void* grad, void* grad_gate, void* grad_up, int rows, int n, int64_t stride, int kind, int type,
                        int threads);
void gristmill_amx_attention_forward(const Attention* a, const bf16* qkv, bf16* out, float* lse);
void gristmill_amx_attention_backward(const Attention* a, const bf16* qkv, const bf16* out, const float* lse, const bf16* grad, float* grad_qkv);
}

static const int ROWS = 64;    // rows that go through everything between two attentions together; those whose gradients of gains are summed first
static const int CHUNK = 512;  // rows that a weight's gradient is summed over at once
static const int STRIP = 64;   // outputs of a weight whose gradient is made at once
static const int BF16 = 1;     // as the kernels are told the type

struct Memory {
    char* at;
    template <typename A> A* take(int64_t count) { A* p = (A*)at; at += (count * (int64_t)sizeof(A) + 63) / 64 * 64; return p; }
};

// Of a block, or the largest of all. A, X and H are zero without attention.
struct Sizes {
    int D, F, A, X, H, T, R;  // R: rows of the last block behind its attention; T and R padded
    Sizes(const Blocks& s, int number) : D(s.hidden), F((int)s.layers[number].ffn), A(0), X(0), H(0), T(padded(s.tokens, ROWS)), R(s.picked ? padded(s.num_picked, ROWS) : T) {
        if (const Attention* a = s.layers[number].attention) H = a->heads, A = a->heads * a->head_dim, X = (a->heads + 2 * a->kv_heads) * a->head_dim;
    }
    static Sizes largest(const Blocks& s) {
        Sizes all(s, 0);
        for (int i = 1; i < s.num_blocks; i++) {
            const Sizes z(s, i);
            all.F = z.F > all.F ? z.F : all.F, all.A = z.A > all.A ? z.A : all.A, all.X = z.X > all.X ? z.X : all.X;
        }
        return all;
    }
};

// What a block computes that its backward pass reads.
struct Kept {
    int rows, rows_padded;                     // behind the attention
    bf16 *x, *qkv, *attended, *middle, *gate, *up;  // x comes first in memory; middle: x and what attention added
    bf16 *picked_x, *picked_attended;          // those of the picked rows
    float *log_sums, *statistics, *mlp_statistics;
    Kept(const Blocks& s, int number, Memory& memory) {
        const Sizes z(s, number);
        const bool picks = s.picked && number == s.num_blocks - 1;
        rows = picks ? s.num_picked : s.tokens, rows_padded = picks ? z.R : z.T;
        const int64_t T = z.T, R = rows_padded;
        x = memory.take<bf16>(T * z.D), qkv = memory.take<bf16>(T * z.X), attended = memory.take<bf16>(T * z.A);
        picked_x = picks ? memory.take<bf16>(R * z.D) : x, picked_attended = picks ? memory.take<bf16>(R * z.A) : attended;
        middle = z.A ? memory.take<bf16>(R * z.D) : picked_x;
        gate = memory.take<bf16>(R * z.F), up = s.layers[number].up.columns ? memory.take<bf16>(R * z.F) : nullptr;
        log_sums = memory.take<float>(T * z.H), statistics = memory.take<float>(2 * T), mlp_statistics = memory.take<float>(2 * R);
    }
};
// Of each block, in memory of its own where all are kept.
static Kept kept_of(const Blocks& s, char* memory, int number) {
    Memory at{memory};
    for (int i = s.keeps ? 0 : number; i < number; i++) Kept(s, i, at);
    return Kept(s, number, at);
}
extern "C" int64_t gristmill_blocks_memory(const Blocks* s) {
    int64_t most = 0;
    for (int i = 0; i < s->num_blocks; i++) {
        Memory at{nullptr};
        for (int j = s->keeps ? 0 : i; j <= i; j++) Kept(*s, j, at);
        most = (int64_t)at.at > most ? (int64_t)at.at : most;
    }
    return most;
}

// Rows of tiles that are bf16 in memory already: out [ROWS, n] = x [ROWS, k] B, or x B + y C.
struct Right { const bf16* tiles; int64_t panel, step; };
static Right transposed(const Weight& w, int k) { return {w.columns, (int64_t)k * TILE, WORDS}; }  // of a weight [n, k], x W^T
static Right plain(const Weight& w, int n) { return {w.rows, WORDS, (int64_t)n * DEPTH}; }         // of a weight [k, n], x W
static void product(int k, int n, const bf16* x, const Right& b, bf16* out, const bf16* y = nullptr, const Right& c = {}) {
    alignas(64) float sums[2 * TILE][2 * TILE];
    for (int j = 0; j < n; j += 2 * TILE)
        for (int i = 0; i < ROWS; i += 2 * TILE) {
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
            accumulate(k / DEPTH, x + (int64_t)i * k, k, b.tiles + j / TILE * b.panel, b.panel, b.step);
            if (y) accumulate(k / DEPTH, y + (int64_t)i * k, k, c.tiles + j / TILE * c.panel, c.panel, c.step);
            _tile_stored(0, sums[0], sizeof *sums); _tile_stored(1, sums[0] + TILE, sizeof *sums);
            _tile_stored(2, sums[TILE], sizeof *sums); _tile_stored(3, sums[TILE] + TILE, sizeof *sums);
            for (int r = 0; r < 2 * TILE; r++) {
                const __m512bh row = _mm512_cvtne2ps_pbh(_mm512_load_ps(sums[r] + TILE), _mm512_load_ps(sums[r]));
                memcpy(out + (int64_t)(i + r) * n + j, &row, sizeof row);
            }
        }
}

static void add(const bf16* x, const bf16* y, bf16* out, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) store(out + i, load(x + i) + load(y + i));
}
template <typename A> static void zero_tail(A* x, int rows, int rows_padded, int n) { memset(x + (int64_t)rows * n, 0, (size_t)(rows_padded - rows) * n * sizeof(A)); }

// Task for each ROWS of rows, which start at `r`, with tiles.
template <typename Task> static void each_rows(int rows, int threads, const Task& task) {
#pragma omp parallel if (threads > 1) num_threads(threads)
    {
        const Tiles tiles;
#pragma omp for schedule(static)
        for (int r = 0; r < rows; r += ROWS) task((int64_t)r);
    }
}
static void norm(const Norm& n, int D, const bf16* x, const bf16* delta, bf16* sum, bf16* out, float* statistics) {
    gristmill_norm_forward(x, delta, n.gain, n.bias, sum, out, statistics, ROWS, D, n.eps, n.centred, BF16, 1);
}

// x [tokens, D] through all blocks: out [tokens or num_picked, D].
extern "C" void gristmill_blocks_forward(const Blocks* blocks, const bf16* x, bf16* out, char* memory) {
    const Blocks& s = *blocks;
    const int D = s.hidden;
    Kept kept = kept_of(s, memory, 0);
    memcpy(kept.x, x, (size_t)s.tokens * D * sizeof(bf16));
    zero_tail(kept.x, s.tokens, padded(s.tokens, ROWS), D);
    for (int number = 0; number < s.num_blocks; number++) {
        const Layer& b = s.layers[number];
        const Sizes z(s, number);
        const Kept k = kept;
        const int F = z.F;
        if (b.attention) {
            each_rows(z.T, s.threads, [&](int64_t r) {
                const std::unique_ptr<bf16[]> normed(new bf16[ROWS * D]);
                norm(b.attention_norm, D, k.x + r * D, nullptr, nullptr, normed.get(), k.statistics + 2 * r);
                product(D, z.X, normed.get(), transposed(b.qkv, D), k.qkv + r * z.X);
            });
            gristmill_amx_attention_forward(b.attention, k.qkv, k.attended, k.log_sums);
            zero_tail(k.attended, s.tokens, z.T, z.A);
        }
        if (k.picked_x != k.x) {
            for (int64_t r = 0; r < k.rows; r++) {
                memcpy(k.picked_x + r * D, k.x + s.picked[r] * D, D * sizeof(bf16));
                if (b.attention) memcpy(k.picked_attended + r * z.A, k.attended + s.picked[r] * z.A, z.A * sizeof(bf16));
            }
            zero_tail(k.picked_x, k.rows, k.rows_padded, D);
            zero_tail(k.picked_attended, k.rows, b.attention ? k.rows_padded : k.rows, z.A);
        }
        const bool last = number == s.num_blocks - 1;
        if (!last) kept = kept_of(s, memory, number + 1);
        each_rows(k.rows_padded, s.threads, [&](int64_t r) {
            const std::unique_ptr<bf16[]> room(new bf16[ROWS * (2 * D + F)]);
            bf16 *delta = room.get(), *normed = delta + ROWS * D, *inner = normed + ROWS * D, *up = k.up ? k.up + r * F : nullptr, *middle = k.middle + r * D;
            if (b.attention) product(z.A, D, k.picked_attended + r * z.A, transposed(b.output, z.A), delta);
            if (F) {
                norm(b.mlp_norm, D, k.picked_x + r * D, b.attention ? delta : nullptr, b.attention ? middle : nullptr, normed, k.mlp_statistics + 2 * r);
                product(D, F, normed, transposed(b.gate, D), k.gate + r * F);
                if (up) product(D, F, normed, transposed(b.up, D), up);
                gristmill_activate(k.gate + r * F, up, inner, nullptr, nullptr, nullptr, ROWS, F, F, s.activation, BF16, 1);
                product(F, D, inner, transposed(b.down, F), delta);
            }
            const int64_t rows = !last ? ROWS : k.rows - r < ROWS ? k.rows - r : ROWS;
            bf16* to = last ? out + r * D : kept.x + r * D;
            if (F) add(middle, delta, to, rows * D);
            else if (b.attention) add(k.picked_x + r * D, delta, to, rows * D);
            else memmove(to, middle, rows * D * sizeof(bf16));
        });
        if (b.states && !last) memcpy(b.states, kept.x, (size_t)s.tokens * D * sizeof(bf16));
    }
}

// out [n, k] = or += g^T x, of g [rows, n] and x [rows, k], whose rows are so far apart and a multiple of TILE. `pairs` has room for CHUNK rows of x.
static void weight_gradient(int rows, int n, int k, const bf16* g, int64_t g_stride, const bf16* x, int64_t x_stride, float* out, bool adds, bf16* pairs, int threads) {
    for (int64_t start = 0; start < rows; start += CHUNK) {
        const int count = rows - start < CHUNK ? (int)(rows - start) : CHUNK, whole = count / DEPTH * DEPTH, filled = padded(count, DEPTH), stride = filled + DEPTH;
        pair_rows(x + start * x_stride, x_stride, whole, k, pairs);
        if (whole < count) {
            const std::unique_ptr<bf16[]> rest(new bf16[DEPTH * k]());
            for (int r = whole; r < count; r++) memcpy(rest.get() + (r - whole) * k, x + (start + r) * x_stride, k * sizeof(bf16));
            pair_rows(rest.get(), k, DEPTH, k, pairs + (int64_t)whole * k);
        }
#pragma omp parallel if (threads > 1) num_threads(threads)
        {
            const Tiles tiles;
            alignas(64) bf16 turned[STRIP * (CHUNK + DEPTH)];
#pragma omp for schedule(static)
            for (int i = 0; i < n; i += STRIP) {
                const int width = n - i < STRIP ? n - i : STRIP;
                columns(g + start * g_stride + i, g_stride, count, width, turned, stride);
                for (int r = 0; r < width; r++) memset(turned + r * stride + count, 0, (filled - count) * sizeof(bf16));
                product(width, k, filled / DEPTH, turned, stride, pairs, WORDS, (int64_t)k * DEPTH, out + (int64_t)i * k, k, adds || start);
            }
        }
    }
}
static void weight_gradient(const Weight& w, int n, int k, const bf16* g, const bf16* x, int rows, bf16* pairs, int threads) {
    if (w.grad) weight_gradient(rows, n, k, g, n, x, k, w.grad, w.adds, pairs, threads);
}
extern "C" void gristmill_weight_gradient(const bf16* g, const bf16* x, float* out, int rows, int n, int k, int64_t g_stride, int64_t x_stride, int adds, int threads) {
    const std::unique_ptr<bf16[]> pairs(new bf16[(int64_t)CHUNK * k]);
    weight_gradient(rows, n, k, g, g_stride, x, x_stride, out, adds, pairs.get(), threads);
}

// Gradients of a norm's gain and bias, of which there is a sum for each ROWS of rows.
static void gain_gradient(const Norm& n, int D, const float* sums, int rows) {
    for (float* grad : {n.grad_gain, n.grad_bias}) {
        const float* from = sums + (grad == n.grad_bias ? D : 0);
        if (!grad) continue;
        if (!n.adds) memset(grad, 0, D * sizeof(float));
        for (int64_t r = 0; r < rows / ROWS; r++) for (int i = 0; i < D; i++) grad[i] += from[2 * r * D + i];
    }
}

// From the gradient of `out` [tokens or num_picked, D] those of weights and of x [tokens, D].
extern "C" void gristmill_blocks_backward(const Blocks* blocks, const bf16* grad_out, bf16* grad_x, char* memory) {
    const Blocks& s = *blocks;
    const Sizes most = Sizes::largest(s);
    const int D = s.hidden;
    const int64_t T = most.T > most.R ? most.T : most.R;
    int widest = most.F > D ? most.F : D;
    widest = most.A > widest ? most.A : widest;
    // [T, .]: gradients of states, of what attention gave, of its input; inner and its gradients; a norm's output; and sums of gains
    const int64_t numbers = T * (4 * D + 2 * most.A + most.X + 3 * most.F) + (int64_t)CHUNK * widest + 64 * 16, sums = T / ROWS * 2 * D + T * most.X;
    const std::unique_ptr<char[]> room(new char[numbers * sizeof(bf16) + sums * sizeof(float) + 64]);
    Memory at{(char*)(((uintptr_t)room.get() + 63) & ~(uintptr_t)63)};
    bf16 *grad = at.take<bf16>(T * D), *of_middle = at.take<bf16>(T * D), *spread = at.take<bf16>(T * D), *grad_attended = at.take<bf16>(T * most.A);
    bf16 *spread_attended = at.take<bf16>(T * most.A), *grad_qkv = at.take<bf16>(T * most.X), *inner = at.take<bf16>(T * most.F), *grad_gate = at.take<bf16>(T * most.F);
    bf16 *grad_up = at.take<bf16>(T * most.F), *normed = at.take<bf16>(T * D), *pairs = at.take<bf16>((int64_t)CHUNK * widest);
    float *gains = at.take<float>(T / ROWS * 2 * D), *sums_qkv = at.take<float>(T * most.X);
    const int num_out = s.picked ? s.num_picked : s.tokens;
    memcpy(grad, grad_out, (size_t)num_out * D * sizeof(bf16));
    zero_tail(grad, num_out, most.R, D);
    for (int number = s.num_blocks - 1; number >= 0; number--) {
        const Layer& b = s.layers[number];
        const Sizes z(s, number);
        const int F = z.F, A = z.A, X = z.X;
        const Kept k = kept_of(s, memory, number);
        if (b.grad_states && number < s.num_blocks - 1) add(grad, b.grad_states, grad, (int64_t)s.tokens * D);
        const auto norm_backward = [&](const Norm& n, const bf16* grad_normed, const bf16* more, const bf16* x, const float* statistics, bf16* to, int64_t r) {
            float* sum = gains + r / ROWS * 2 * D;
            gristmill_norm_backward(grad_normed, more + r * D, x + r * D, n.gain, statistics + 2 * r, to + r * D, sum, sum + D, ROWS, D, n.centred, BF16, 1);
        };
        bf16* grad_middle = F ? of_middle : grad;
        each_rows(k.rows_padded, s.threads, [&](int64_t r) {
            if (F) {
                const std::unique_ptr<bf16[]> of_rows(new bf16[ROWS * (F + D)]);
                bf16 *grad_inner = of_rows.get(), *grad_normed = grad_inner + ROWS * F, *up = k.up ? k.up + r * F : nullptr;
                product(D, F, grad + r * D, plain(b.down, F), grad_inner);
                gristmill_activate(k.gate + r * F, up, inner + r * F, grad_inner, grad_gate + r * F, grad_up + r * F, ROWS, F, F, s.activation, BF16, 1);
                norm(b.mlp_norm, D, k.middle + r * D, nullptr, nullptr, normed + r * D, k.mlp_statistics + 2 * r);
                product(F, D, grad_gate + r * F, plain(b.gate, D), grad_normed, up ? grad_up + r * F : nullptr, plain(b.up, D));
                norm_backward(b.mlp_norm, grad_normed, grad, k.middle, k.mlp_statistics, grad_middle, r);
            }
            if (A) product(D, A, grad_middle + r * D, plain(b.output, A), grad_attended + r * A);
        });
        if (F) {
            gain_gradient(b.mlp_norm, D, gains, k.rows_padded);
            weight_gradient(b.down, D, F, grad, inner, k.rows_padded, pairs, s.threads);
            weight_gradient(b.gate, F, D, grad_gate, normed, k.rows_padded, pairs, s.threads);
            if (k.up) weight_gradient(b.up, F, D, grad_up, normed, k.rows_padded, pairs, s.threads);
        }
        if (A) weight_gradient(b.output, D, A, grad_middle, k.picked_attended, k.rows_padded, pairs, s.threads);
        const bf16 *middle = grad_middle, *of_attended = grad_attended;
        if (k.picked_x != k.x) {  // a token may be picked more than once
            memset(spread, 0, (size_t)z.T * D * sizeof(bf16));
            memset(spread_attended, 0, (size_t)z.T * A * sizeof(bf16));
            for (int64_t r = 0; r < k.rows; r++) {
                add(spread + s.picked[r] * D, grad_middle + r * D, spread + s.picked[r] * D, D);
                add(spread_attended + s.picked[r] * A, grad_attended + r * A, spread_attended + s.picked[r] * A, A);
            }
            middle = spread, of_attended = spread_attended;
        }
        if (!A) {
            if (middle != grad) memcpy(grad, middle, (size_t)z.T * D * sizeof(bf16));
            continue;
        }
        gristmill_amx_attention_backward(b.attention, k.qkv, k.attended, k.log_sums, of_attended, sums_qkv);
        zero_tail(sums_qkv, s.tokens, z.T, X);
        each_rows(z.T, s.threads, [&](int64_t r) {
            const std::unique_ptr<bf16[]> grad_normed(new bf16[ROWS * D]);
            for (int64_t i = r * X; i < (r + ROWS) * X; i += VL) store(grad_qkv + i, load(sums_qkv + i));
            norm(b.attention_norm, D, k.x + r * D, nullptr, nullptr, normed + r * D, k.statistics + 2 * r);
            product(X, D, grad_qkv + r * X, plain(b.qkv, D), grad_normed.get());
            norm_backward(b.attention_norm, grad_normed.get(), middle, k.x, k.statistics, grad, r);
        });
        gain_gradient(b.attention_norm, D, gains, z.T);
        weight_gradient(b.qkv, X, D, grad_qkv, normed, z.T, pairs, s.threads);
    }
    memcpy(grad_x, grad, (size_t)s.tokens * D * sizeof(bf16));
}

// A weight [n, k] as tiles for the right side of products: pairs of its columns for x W^T, and pairs of its rows for x W.
extern "C" void gristmill_tiles_of(const float* weight, int n, int k, bf16* of_columns, bf16* of_rows) {
    const std::unique_ptr<bf16[]> used(new bf16[(int64_t)n * k]);
    for (int64_t i = 0; i < (int64_t)n * k; i += VL) store(used.get() + i, load(weight + i));
    pair_columns(used.get(), n, k, of_columns);
    pair_rows(used.get(), k, n, k, of_rows);
}

#else

extern "C" int64_t gristmill_blocks_memory(const Blocks*) { return 0; }
extern "C" void gristmill_blocks_forward(const Blocks*, const bf16*, bf16*, char*) {}
extern "C" void gristmill_blocks_backward(const Blocks*, const bf16*, bf16*, char*) {}
extern "C" void gristmill_tiles_of(const float*, int, int, bf16*, bf16*) {}
extern "C" void gristmill_weight_gradient(const bf16*, const bf16*, float*, int, int, int, int64_t, int64_t, int, int) {}

#endif
