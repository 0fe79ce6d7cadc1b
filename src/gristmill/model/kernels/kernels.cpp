// Kernels of training and rating on CPUs: variable-length causal attention forward and backward with the rotation inside, residual add
// and norm, gated activations, softmax over the vocabulary. Built by core/native.py without any header of torch; called through ctypes.
//
// Sums are float32 whatever the type in memory, and every output is summed in one order: threads change no bit.

#include "attention.h"

static const int PANEL = 2 * VL;      // columns of a micro-kernel: two vectors
static const int TILE_ROWS = 6;       // and its rows: twelve sums, which with their operands fit sixteen registers
static const int BLOCK_ROWS = 48;     // rows of scores made at once (more only where more query heads share a key head)
static const int BLOCK_KEYS = 8 * 16; // keys that go through the backward pass at once
static const int NORM_ROWS = 64;      // rows whose gradients of gains are summed before they are added to the others
static const float HIDDEN = -1e30f;

// ---- products of small matrices ----

// C [R, PANEL] = or += A [R, k] B [k, PANEL]. Element (r, p) of A lies at a[r * row + p * column].
template <int R> static inline void micro(const float* a, int64_t row, int64_t column, const float* b, int64_t ldb, int k, float* c, int64_t ldc, bool add) {
    vec sum[R][2] = {};
    if (add) for (int r = 0; r < R; r++) { sum[r][0] = load(c + r * ldc); sum[r][1] = load(c + r * ldc + VL); }
    for (int p = 0; p < k; p++) {
        const vec b0 = load(b + p * ldb), b1 = load(b + p * ldb + VL);
        for (int r = 0; r < R; r++) {
            const float x = a[r * row + p * column];
            sum[r][0] += x * b0;
            sum[r][1] += x * b1;
        }
    }
    for (int r = 0; r < R; r++) { store(c + r * ldc, sum[r][0]); store(c + r * ldc + VL, sum[r][1]); }
}

// C [m, panels * PANEL] = or += A [m, k] B. Panels of B are `panel` floats apart and their rows `ldb`.
static void product(int m, int panels, int k, const float* a, int64_t row, int64_t column, const float* b, int64_t panel, int64_t ldb, float* c, int64_t ldc, bool add) {
    for (int n = 0; n < panels; n++) {
        const float* at = b + n * panel;
        int i = 0;
        for (; i + TILE_ROWS <= m; i += TILE_ROWS) micro<TILE_ROWS>(a + i * row, row, column, at, ldb, k, c + i * ldc + n * PANEL, ldc, add);
        const float* rest = a + i * row;
        float* to = c + i * ldc + n * PANEL;
        switch (m - i) {
            case 5: micro<5>(rest, row, column, at, ldb, k, to, ldc, add); break;
            case 4: micro<4>(rest, row, column, at, ldb, k, to, ldc, add); break;
            case 3: micro<3>(rest, row, column, at, ldb, k, to, ldc, add); break;
            case 2: micro<2>(rest, row, column, at, ldb, k, to, ldc, add); break;
            case 1: micro<1>(rest, row, column, at, ldb, k, to, ldc, add); break;
        }
    }
}

// ---- attention ----

static int panels_of(int keys) { return (keys + PANEL - 1) / PANEL; }
static int block_rows(int G) { return G >= BLOCK_ROWS ? G : BLOCK_ROWS / G * G; }

// Rows of x, transposed into panels of keys: [panels, d, PANEL].
static void transpose(const float* x, int64_t ld, int n, int d, float* out) {
    memset(out + (int64_t)(n / PANEL) * d * PANEL, 0, n % PANEL ? (size_t)d * PANEL * sizeof(float) : 0);
    for (int j = 0; j < n; j++) {
        float* to = out + (int64_t)(j / PANEL) * d * PANEL + j % PANEL;
        for (int i = 0; i < d; i++) to[(int64_t)i * PANEL] = x[j * ld + i];
    }
}

// Scores of a row: capped, and those outside [from, to) hidden.
static inline void finish_scores(float* s, int width, int from, int to, float cap) {
    if (cap > 0) for (int j = 0; j < width; j += VL) store(s + j, cap * tanh_(load(s + j) * (1.f / cap)));
    for (int j = 0; j < from && j < width; j++) s[j] = HIDDEN;
    for (int j = to < 0 ? 0 : to; j < width; j++) s[j] = HIDDEN;
}

static void forward(const Attention& a, const Document& x, int h, const float* qkv, float* out, float* lse, Scratch& scratch) {
    const int H = a.heads, K = a.kv_heads, d = a.head_dim, G = H / K, e = (d + PANEL - 1) / PANEL * PANEL;
    const int64_t row = (int64_t)(H + 2 * K) * d;
    const int most = block_rows(G), width = panels_of(x.n) * PANEL;
    scratch.reset((size_t)width * d + 2 * (size_t)x.n * e + (size_t)most * (width + 2 * e));
    float *kt = scratch.take((size_t)width * d), *k = scratch.take((size_t)x.n * e), *v = scratch.take((size_t)x.n * e);
    float *scores = scratch.take((size_t)most * width), *q = scratch.take((size_t)most * e), *result = scratch.take((size_t)most * e);
    for (int j = 0; j < x.n; j++) {
        const int64_t t = x.token(j);
        rotated(qkv + t * row + (h * (G + 2) + G) * d, k + (int64_t)j * e, d, a.pairs, a.cos + t * a.pairs, a.sin + t * a.pairs, 1.f, 1.f);
        memcpy(v + (int64_t)j * e, qkv + t * row + (h * (G + 2) + G + 1) * d, d * sizeof(float));
        memset(v + (int64_t)j * e + d, 0, (e - d) * sizeof(float));
    }
    transpose(k, e, x.n, d, kt);
    for (int start = 0; start < x.rows; start += most) {
        const int count = x.rows - start < most ? x.rows - start : most;
        for (int r = 0; r < count; r++) {
            const int64_t t = x.start + (start + r) / G;
            rotated(qkv + t * row + (h * (G + 2) + (start + r) % G) * d, q + (int64_t)r * e, d, a.pairs, a.cos + t * a.pairs, a.sin + t * a.pairs, 1.f, a.scale);
        }
        const int end = x.shared + (start + count - 1) / G + 1, earliest = x.shared + start / G + 1 - a.window;
        const int first = a.window && earliest > 0 ? earliest / PANEL : 0, base = first * PANEL;
        const int panels = (end - base + PANEL - 1) / PANEL, seen = panels * PANEL;
        product(count, panels, d, q, e, 1, kt + (int64_t)first * d * PANEL, (int64_t)d * PANEL, PANEL, scores, width, false);
        for (int r = 0; r < count; r++) {
            float* s = scores + (int64_t)r * width;
            const int to = x.shared + (start + r) / G + 1 - base, from = a.window ? to - a.window : 0;
            finish_scores(s, seen, from, to, a.cap);
            vec top = load(s), sum = {};
            for (int j = VL; j < seen; j += VL) { const vec y = load(s + j); top = y > top ? y : top; }
            const float m = max_of(top);
            for (int j = 0; j < seen; j += VL) { const vec y = exp_(load(s + j) - m); sum += y; store(s + j, y); }
            const float total = sum_of(sum), inverse = 1.f / total;
            for (int j = 0; j < seen; j += VL) store(s + j, load(s + j) * inverse);
            if (lse) lse[(x.start + (start + r) / G) * (int64_t)H + h * G + (start + r) % G] = m + std::log(total);
        }
        for (int at = base; at < end; at += 2 * BLOCK_KEYS) {
            const int keys = end - at < 2 * BLOCK_KEYS ? end - at : 2 * BLOCK_KEYS;
            product(count, e / PANEL, keys, scores + at - base, width, 1, v + (int64_t)at * e, PANEL, e, result, e, at > base);
        }
        for (int r = 0; r < count; r++)
            memcpy(out + ((x.start + (start + r) / G) * (int64_t)H + h * G + (start + r) % G) * d, result + (int64_t)r * e, d * sizeof(float));
    }
}

static void backward(const Attention& a, const Document& x, int h, const float* qkv, const float* out, const float* lse, const float* grad, float* grad_qkv,
                     Scratch& scratch) {
    const int H = a.heads, K = a.kv_heads, d = a.head_dim, G = H / K, e = (d + PANEL - 1) / PANEL * PANEL;
    const int64_t row = (int64_t)(H + 2 * K) * d;
    const size_t keys_e = (size_t)x.n * e, rows_e = (size_t)x.rows * e, panels_d = (size_t)panels_of(x.n) * PANEL * d;
    const int most = block_rows(G);
    scratch.reset(2 * panels_d + 4 * keys_e + 3 * rows_e + 2 * (size_t)x.rows + 2 * (size_t)most * BLOCK_KEYS);
    float *kt = scratch.take(panels_d), *vt = scratch.take(panels_d), *k = scratch.take(keys_e), *v = scratch.take(keys_e);
    float *dk = scratch.take(keys_e), *dv = scratch.take(keys_e), *q = scratch.take(rows_e), *go = scratch.take(rows_e), *dq = scratch.take(rows_e);
    float *delta = scratch.take(x.rows), *sums = scratch.take(x.rows);
    float *p = scratch.take((size_t)most * BLOCK_KEYS), *ds = scratch.take((size_t)most * BLOCK_KEYS);
    memset(k, 0, keys_e * sizeof(float));
    memset(dk, 0, (2 * keys_e + 3 * rows_e) * sizeof(float));
    for (int j = 0; j < x.n; j++) {
        const int64_t t = x.token(j);
        rotated(qkv + t * row + (h * (G + 2) + G) * d, k + (int64_t)j * e, d, a.pairs, a.cos + t * a.pairs, a.sin + t * a.pairs, 1.f, 1.f);
        memcpy(v + (int64_t)j * e, qkv + t * row + (h * (G + 2) + G + 1) * d, d * sizeof(float));
    }
    transpose(k, e, x.n, d, kt);
    transpose(v, e, x.n, d, vt);
    for (int r = 0; r < x.rows; r++) {
        const int64_t t = x.start + r / G, head = t * H + h * G + r % G;
        rotated(qkv + t * row + (h * (G + 2) + r % G) * d, q + (int64_t)r * e, d, a.pairs, a.cos + t * a.pairs, a.sin + t * a.pairs, 1.f, a.scale);
        memcpy(go + (int64_t)r * e, grad + head * d, d * sizeof(float));
        float sum = 0;
        for (int i = 0; i < d; i++) sum += grad[head * d + i] * out[head * d + i];
        delta[r] = sum;
        sums[r] = lse[head];
    }
    for (int at = 0; at < x.n; at += BLOCK_KEYS) {
        const int block = x.n - at < BLOCK_KEYS ? x.n - at : BLOCK_KEYS;
        const int earliest = at > x.shared ? at - x.shared : 0;  // own token that sees a key of these, and the one after the last
        const int latest = a.window && at + block - 1 + a.window - x.shared < x.own ? at + block - 1 + a.window - x.shared : x.own;
        for (int start = earliest * G; start < latest * G; start += most) {
            const int count = latest * G - start < most ? latest * G - start : most;
            const float *q_rows = q + (int64_t)start * e, *go_rows = go + (int64_t)start * e;
            const int last = x.shared + (start + count - 1) / G + 1 - at, keys = last < block ? last : block;  // that some row sees
            const int panels = (keys + PANEL - 1) / PANEL, seen = panels * PANEL;
            const int64_t panel = (int64_t)d * PANEL, from_panel = (int64_t)(at / PANEL) * panel;
            product(count, panels, d, q_rows, e, 1, kt + from_panel, panel, PANEL, p, BLOCK_KEYS, false);
            product(count, panels, d, go_rows, e, 1, vt + from_panel, panel, PANEL, ds, BLOCK_KEYS, false);
            for (int r = 0; r < count; r++) {
                float *s = p + r * BLOCK_KEYS, *g = ds + r * BLOCK_KEYS;
                const int to = x.shared + (start + r) / G + 1 - at, from = a.window ? to - a.window : 0;
                finish_scores(s, seen, from, to, a.cap);
                const float sum = sums[start + r], centre = delta[start + r], by = a.cap > 0 ? 1.f / a.cap : 0.f;
                for (int j = 0; j < seen; j += VL) {
                    const vec score = load(s + j), y = exp_(score - sum), capped = score * by;
                    store(g + j, y == 0 ? vec{} : y * (load(g + j) - centre) * (1.f - capped * capped));
                    store(s + j, y);
                }
            }
            product(keys, e / PANEL, count, p, 1, BLOCK_KEYS, go_rows, PANEL, e, dv + (int64_t)at * e, e, true);
            product(keys, e / PANEL, count, ds, 1, BLOCK_KEYS, q_rows, PANEL, e, dk + (int64_t)at * e, e, true);
            product(count, e / PANEL, keys, ds, BLOCK_KEYS, 1, k + (int64_t)at * e, PANEL, e, dq + (int64_t)start * e, e, true);
        }
    }
    for (int r = 0; r < x.rows; r++) {
        const int64_t t = x.start + r / G;
        rotated(dq + (int64_t)r * e, grad_qkv + t * row + (h * (G + 2) + r % G) * d, d, a.pairs, a.cos + t * a.pairs, a.sin + t * a.pairs, -1.f, a.scale);
    }
    for (int j = 0; j < x.n; j++) {
        const int64_t t = x.token(j);
        float *to_k = grad_qkv + t * row + (h * (G + 2) + G) * d, *to_v = to_k + d, *turned = dk + (int64_t)j * e;
        if (j >= x.shared) {
            rotated(turned, to_k, d, a.pairs, a.cos + t * a.pairs, a.sin + t * a.pairs, -1.f, 1.f);
            memcpy(to_v, dv + (int64_t)j * e, d * sizeof(float));
            continue;
        }
        rotated(turned, p, d, a.pairs, a.cos + t * a.pairs, a.sin + t * a.pairs, -1.f, 1.f);  // its holder's are there already
        for (int i = 0; i < d; i++) { to_k[i] += p[i]; to_v[i] += dv[(int64_t)j * e + i]; }
    }
}

// qkv [T, H + 2K, d] grouped by key head (its queries, its key, its value), before the rotation; out [T, H, d], lse [T, H] or null.
extern "C" void gristmill_attention_forward(const Attention* a, const float* qkv, float* out, float* lse) {
    each(*a, [&](const Document& x, int h, Scratch& scratch) { forward(*a, x, h, qkv, out, lse, scratch); });
}
extern "C" void gristmill_attention_backward(const Attention* a, const float* qkv, const float* out, const float* lse, const float* grad, float* grad_qkv) {
    each(*a, [&](const Document& x, int h, Scratch& scratch) { backward(*a, x, h, qkv, out, lse, grad, grad_qkv, scratch); });
}

// ---- norms ----

// sum = x + delta if there is a delta; out = its norm; statistics [rows, 2]: mean (0 where not centred) and 1 / deviation.
template <typename A>
static void norm(const A* x, const A* delta, const float* gain, const float* bias, A* sum, A* out, float* statistics, int rows, int n, float eps, int centred, int threads) {
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
    for (int r = 0; r < rows; r++) {
        const A* p = x + (int64_t)r * n;
        int i = 0;
        if (delta) {
            const A* more = delta + (int64_t)r * n;
            A* to = sum + (int64_t)r * n;
            for (; i + VL <= n; i += VL) store(to + i, load(p + i) + load(more + i));
            for (; i < n; i++) put(to + i, get(p + i) + get(more + i));
            p = to;
        }
        float mean = 0, square = 0;
        vec all = {};
        if (centred) {
            for (i = 0; i + VL <= n; i += VL) all += load(p + i);
            mean = sum_of(all);
            for (; i < n; i++) mean += get(p + i);
            mean /= n;
        }
        all = vec{};
        for (i = 0; i + VL <= n; i += VL) { const vec v = load(p + i) - mean; all += v * v; }
        square = sum_of(all);
        for (; i < n; i++) square += (get(p + i) - mean) * (get(p + i) - mean);
        const float by = (float)(1.0 / std::sqrt((double)square / n + eps));
        A* to = out + (int64_t)r * n;
        for (i = 0; i + VL <= n; i += VL) {
            const vec y = (load(p + i) - mean) * by * load(gain + i);
            store(to + i, bias ? y + load(bias + i) : y);
        }
        for (; i < n; i++) put(to + i, (get(p + i) - mean) * by * gain[i] + (bias ? bias[i] : 0.f));
        if (statistics) { statistics[2 * (int64_t)r] = mean; statistics[2 * (int64_t)r + 1] = by; }
    }
}

// Gradient of x (that of the sum too, plus grad_sum if there is one), and of gain and bias (null where there are none).
template <typename A>
static void norm_backward(const A* grad, const A* grad_sum, const A* x, const float* gain, const float* statistics, A* grad_x, float* grad_gain, float* grad_bias,
                          int rows, int n, int centred, int threads) {
    const int chunks = (rows + NORM_ROWS - 1) / NORM_ROWS;
    std::vector<float> parts((size_t)chunks * 2 * n);
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
    for (int c = 0; c < chunks; c++) {
        float *gains = parts.data() + (size_t)c * 2 * n, *biases = gains + n;
        for (int r = c * NORM_ROWS; r < rows && r < (c + 1) * NORM_ROWS; r++) {
            const A *g = grad + (int64_t)r * n, *p = x + (int64_t)r * n, *more = grad_sum ? grad_sum + (int64_t)r * n : nullptr;
            A* to = grad_x + (int64_t)r * n;
            const float mean = statistics[2 * (int64_t)r], by = statistics[2 * (int64_t)r + 1];
            vec first = {}, second = {};
            int i = 0;
            for (; i + VL <= n; i += VL) {
                const vec y = load(g + i), normed = (load(p + i) - mean) * by, scaled = y * load(gain + i);
                first += scaled;
                second += scaled * normed;
                store(gains + i, load(gains + i) + y * normed);
                store(biases + i, load(biases + i) + y);
            }
            float sum = sum_of(first), product = sum_of(second);
            for (; i < n; i++) {
                const float y = get(g + i), normed = (get(p + i) - mean) * by, scaled = y * gain[i];
                sum += scaled; product += scaled * normed; gains[i] += y * normed; biases[i] += y;
            }
            const float shift = centred ? sum / n : 0.f, slope = product / n;
            for (i = 0; i + VL <= n; i += VL) {
                const vec normed = (load(p + i) - mean) * by, y = by * (load(g + i) * load(gain + i) - shift - normed * slope);
                store(to + i, more ? y + load(more + i) : y);
            }
            for (; i < n; i++) put(to + i, by * (get(g + i) * gain[i] - shift - (get(p + i) - mean) * by * slope) + (more ? get(more + i) : 0.f));
        }
    }
    if (grad_gain) memset(grad_gain, 0, n * sizeof(float));
    if (grad_bias) memset(grad_bias, 0, n * sizeof(float));
    for (int c = 0; c < chunks; c++) for (int i = 0; i < n; i++) {
        const float *gains = parts.data() + (size_t)c * 2 * n;
        if (grad_gain) grad_gain[i] += gains[i];
        if (grad_bias) grad_bias[i] += gains[n + i];
    }
}

// Types: 0 float32, 1 bfloat16.
extern "C" void gristmill_norm_forward(const void* x, const void* delta, const float* gain, const float* bias, void* sum, void* out, float* statistics, int rows,
                                       int n, float eps, int centred, int type, int threads) {
    if (type == 0) norm((const float*)x, (const float*)delta, gain, bias, (float*)sum, (float*)out, statistics, rows, n, eps, centred, threads);
    else norm((const bf16*)x, (const bf16*)delta, gain, bias, (bf16*)sum, (bf16*)out, statistics, rows, n, eps, centred, threads);
}
extern "C" void gristmill_norm_backward(const void* grad, const void* grad_sum, const void* x, const float* gain, const float* statistics, void* grad_x,
                                        float* grad_gain, float* grad_bias, int rows, int n, int centred, int type, int threads) {
    if (type == 0) norm_backward((const float*)grad, (const float*)grad_sum, (const float*)x, gain, statistics, (float*)grad_x, grad_gain, grad_bias, rows, n, centred, threads);
    else norm_backward((const bf16*)grad, (const bf16*)grad_sum, (const bf16*)x, gain, statistics, (bf16*)grad_x, grad_gain, grad_bias, rows, n, centred, threads);
}

// ---- activations ----

// out = f(gate) * up, or f(gate) where up is null; backward also their gradients. Rows of gate and up are `stride` apart, as are those of their gradients.
template <int KIND, typename A>
static void activate(const A* gate, const A* up, A* out, const A* grad, A* grad_gate, A* grad_up, int rows, int n, int64_t stride, int threads) {
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
    for (int r = 0; r < rows; r++) {
        const int64_t in = r * stride, at = (int64_t)r * n;
        for (int i = 0; i < n; i += VL) {
            const int left = n - i;
            vec slope;
            const vec y = activated<KIND>(some(gate + in + i, left), &slope), u = up ? some(up + in + i, left) : vec{} + 1.f;
            if (out) keep(out + at + i, y * u, left);
            if (!grad) continue;
            const vec g = some(grad + at + i, left);
            keep(grad_gate + in + i, g * u * slope, left);
            if (up) keep(grad_up + in + i, g * y, left);
        }
    }
}
template <typename A>
static void activate(const void* gate, const void* up, void* out, const void* grad, void* grad_gate, void* grad_up, int rows, int n, int64_t stride, int kind, int threads) {
    const auto run = kind == SILU ? activate<SILU, A> : kind == GELU ? activate<GELU, A> : activate<SQUARED_RELU, A>;
    run((const A*)gate, (const A*)up, (A*)out, (const A*)grad, (A*)grad_gate, (A*)grad_up, rows, n, stride, threads);
}
extern "C" void gristmill_activate(const void* gate, const void* up, void* out, const void* grad, void* grad_gate, void* grad_up, int rows, int n, int64_t stride,
                                   int kind, int type, int threads) {
    if (type == 0) activate<float>(gate, up, out, grad, grad_gate, grad_up, rows, n, stride, kind, threads);
    else activate<bf16>(gate, up, out, grad, grad_gate, grad_up, rows, n, stride, kind, threads);
}

// ---- softmax over the vocabulary ----

// Statistics [rows, 2] of a softmax: the largest number of each row, and the logarithm of the sum of exponentials of the distances from it.
// Rows are `stride` apart.
template <typename A> static void softmax_forward(const A* logits, float* statistics, int rows, int n, int64_t stride, int threads) {
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
    for (int r = 0; r < rows; r++) {
        const A* p = logits + r * stride;
        vec top = vec{} - INFINITY;
        int i = 0;
        for (; i + VL <= n; i += VL) { const vec x = load(p + i); top = x > top ? x : top; }
        float m = max_of(top);
        for (; i < n; i++) m = get(p + i) > m ? get(p + i) : m;
        double total = 0;
        for (i = 0; i + VL <= n;) {
            vec part = {};
            for (const int end = i + 64 * VL; i + VL <= n && i < end; i += VL) part += exp_(load(p + i) - m);
            total += sum_of(part);
        }
        for (; i < n; i++) total += std::exp(get(p + i) - m);
        statistics[2 * (int64_t)r] = m;
        statistics[2 * (int64_t)r + 1] = (float)std::log(total);
    }
}

// out = factor * (softmax - onehot of the target, which is elsewhere where it is below zero); out may be the logits themselves. Its rows are
// `to_stride` apart.
template <typename A>
static void softmax_backward(const A* logits, const float* statistics, const int64_t* targets, const float* factor, A* out, int rows, int n, int64_t stride,
                             int64_t to_stride, int threads) {
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
    for (int r = 0; r < rows; r++) {
        const A* p = logits + r * stride;
        A* to = out + r * to_stride;
        const float m = statistics[2 * (int64_t)r], sum = statistics[2 * (int64_t)r + 1], by = factor[r];
        const float target = targets[r] < 0 ? 0.f : std::exp(get(p + targets[r]) - m - sum);
        for (int i = 0; i < n; i += VL) keep(to + i, by * exp_(some(p + i, n - i) - m - sum), n - i);
        if (targets[r] >= 0) put(to + targets[r], by * (target - 1.f));
    }
}

// KL(p || q) of each row, with p the softmax of the teacher's logits; where it `keeps` them, q - p in the place of the logits.
template <typename A>
static void kl_divergence(A* logits, const float* statistics, const A* teacher, const float* of_teacher, float* kl, int rows, int n, int64_t stride, int64_t teacher_stride, int keeps, int threads) {
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
    for (int r = 0; r < rows; r++) {
        A* q = logits + r * stride;
        const A* p = teacher + r * teacher_stride;
        const float m = statistics[2 * (int64_t)r], sum = statistics[2 * (int64_t)r + 1], t = of_teacher[2 * (int64_t)r], t_sum = of_teacher[2 * (int64_t)r + 1];
        double total = 0;
        int i = 0;
        while (i + VL <= n) {
            vec part = {};
            for (const int end = i + 64 * VL; i + VL <= n && i < end; i += VL) {
                const vec log_q = load(q + i) - m - sum, log_p = load(p + i) - t - t_sum, prob = exp_(log_p);
                part += prob * (log_p - log_q);
                if (keeps) store(q + i, exp_(log_q) - prob);
            }
            total += sum_of(part);
        }
        for (; i < n; i++) {
            const float log_q = get(q + i) - m - sum, log_p = get(p + i) - t - t_sum, prob = std::exp(log_p);
            total += prob * (log_p - log_q);
            if (keeps) put(q + i, std::exp(log_q) - prob);
        }
        kl[r] = (float)total;
    }
}
extern "C" void gristmill_softmax_forward(const void* logits, float* statistics, int rows, int n, int64_t stride, int type, int threads) {
    if (type == 0) softmax_forward((const float*)logits, statistics, rows, n, stride, threads);
    else softmax_forward((const bf16*)logits, statistics, rows, n, stride, threads);
}
extern "C" void gristmill_softmax_backward(const void* logits, const float* statistics, const int64_t* targets, const float* factor, void* out, int rows, int n,
                                           int64_t stride, int64_t to_stride, int type, int threads) {
    if (type == 0) softmax_backward((const float*)logits, statistics, targets, factor, (float*)out, rows, n, stride, to_stride, threads);
    else softmax_backward((const bf16*)logits, statistics, targets, factor, (bf16*)out, rows, n, stride, to_stride, threads);
}
extern "C" void gristmill_kl_divergence(void* logits, const float* statistics, const void* teacher, const float* of_teacher, float* kl, int rows, int n, int64_t stride, int64_t teacher_stride, int keeps, int type, int threads) {
    if (type == 0) kl_divergence((float*)logits, statistics, (const float*)teacher, of_teacher, kl, rows, n, stride, teacher_stride, keeps, threads);
    else kl_divergence((bf16*)logits, statistics, (const bf16*)teacher, of_teacher, kl, rows, n, stride, teacher_stride, keeps, threads);
}
