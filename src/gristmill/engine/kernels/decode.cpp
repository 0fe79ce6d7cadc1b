// Decoder layers of one step for CPUs in one call: what layers.py does layer by layer, by the same kernels and with the same rounding.

#include "kernels.h"

#include <vector>

struct Norm {  // none where there is no gain
    const float *gain, *bias;
    float eps;
    int32_t centred;
};
struct Matrix {  // as in Product; none where there is no weight
    const void *weight, *scale;
    const float* bias;
    int32_t kind, n, d, quantized;  // whether activations become int8 first
};
struct Block {
    const Layer* attention;  // null in a layer that has none
    Norm attention_norm, q_norm, k_norm, attention_post_norm, mlp_norm, mlp_post_norm;
    Matrix qkv, output, gate, up, down;  // a layer without a down has no MLP; rows of a gate without an up are followed by the up's
    int32_t activation, norms_whole;     // whether all heads of a token are normed together
    float multiplier;                    // of what attention and MLP add
    int32_t padding;
};
struct Decoder {
    const Block* blocks;
    Norm final_norm;
    int32_t num_blocks, hidden, type, cache_type;  // types as attention is told them
};

static const int64_t MIN_SHARED = 1 << 15;  // activations that are worth another thread

// out = f(gate) * up, rounded in between; rows of gate and up are `stride` apart.
template <int KIND, typename A> static void activate(const A* gate, const A* up, int64_t stride, A* out, int rows, int n, int threads) {
#pragma omp parallel for if (threads > 1 && (int64_t)rows * n >= MIN_SHARED) num_threads(threads) schedule(static)
    for (int r = 0; r < rows; r++) for (int i = 0; i < n; i += VL) {
        vec slope;
        const vec y = activated<KIND>(some(gate + r * stride + i, n - i), &slope);
        keep(out + (int64_t)r * n + i, rounded(y, out) * some(up + r * stride + i, n - i), n - i);
    }
}

template <typename A> struct Run {
    const Decoder& decoder;
    const Step& step;
    int rows;
    const int32_t* last;        // rows that the last block goes on with behind its attention; null for all
    int num_last;
    A* x;                       // residual stream
    const A* pending = nullptr; // what the next norm adds to it
    std::vector<A> normed, qkv, attended, added, gate, up, picked_x, picked;
    std::vector<float> squared, scales;
    std::vector<int8_t> small;

    Run(const Decoder& decoder, const Step& step, int rows, A* x, const int32_t* last, int num_last)
        : decoder(decoder), step(step), rows(rows), last(last), num_last(num_last), x(x), scales(rows) {}
    static A* room(std::vector<A>& memory, int64_t n) { if ((int64_t)memory.size() < n) memory.resize(n); return memory.data(); }

    void product(const Matrix& m, const void* in, int type, void* out, int out_type) {
        const float* row_scale = nullptr;
        if (m.quantized) {
            if ((int64_t)small.size() < (int64_t)rows * m.d) small.resize((int64_t)rows * m.d);
            gristmill_quantize(in, small.data(), scales.data(), rows, m.d, type);
            in = small.data(), row_scale = scales.data(), type = 2;
        }
        const Product p{in, m.weight, m.scale, row_scale, m.bias, out, type, m.kind, out_type, rows, m.n, m.d, step.threads};
        gristmill_product(&p);
    }
    A* product(const Matrix& m, const A* in, std::vector<A>& memory) {
        A* out = room(memory, (int64_t)rows * m.n);
        product(m, in, decoder.type, out, decoder.type);
        return out;
    }
    void norm(const Norm& n, A* in, const A* delta, A* out, int count, int width) {
        gristmill_norm(in, delta, n.gain, n.bias, out, nullptr, nullptr, count, width, n.eps, n.centred, decoder.type);
    }
    // Norm over `parts` stretches of `size` numbers, `stride` apart, as if they were one.
    void whole_norm(const Norm& n, A* x, int parts, int size, int stride) {
        std::vector<A> together((size_t)parts * size);
        for (int i = 0; i < parts; i++) memcpy((void*)(together.data() + (int64_t)i * size), (const void*)(x + (int64_t)i * stride), size * sizeof(A));
        norm(n, together.data(), nullptr, together.data(), 1, parts * size);
        for (int i = 0; i < parts; i++) memcpy((void*)(x + (int64_t)i * stride), (const void*)(together.data() + (int64_t)i * size), size * sizeof(A));
    }
    // The residual stream with what is pending, and its norm, or the stream itself where a family has no norm there.
    const A* stream(const Norm& n, A* out) {
        const A* delta = pending;
        pending = nullptr;
        if (n.gain) { norm(n, x, delta, out, rows, decoder.hidden); return out; }
        if (delta) for (int64_t i = 0; i < (int64_t)rows * decoder.hidden; i++) put(x + i, get(x + i) + get(delta + i));
        return x;
    }
    void add(const Norm& post, float multiplier) {
        if (post.gain) norm(post, added.data(), nullptr, added.data(), rows, decoder.hidden);
        if (multiplier != 1) for (int64_t i = 0; i < (int64_t)rows * decoder.hidden; i++) put(added.data() + i, get(added.data() + i) * multiplier);
        pending = added.data();
    }
    const A* pick(const A* from, std::vector<A>& memory, int width) {
        A* to = room(memory, (int64_t)num_last * width);
        for (int i = 0; i < num_last; i++) memcpy((void*)(to + (int64_t)i * width), (const void*)(from + (int64_t)last[i] * width), width * sizeof(A));
        return to;
    }
    // Go on with the rows of `last`: of the residual stream, and of what a product or the next norm is about to read.
    const A* pick_last(const A* other, int width) {
        x = (A*)pick(x, picked_x, decoder.hidden);
        if (other) other = pick(other, picked, width);
        rows = num_last;
        return other;
    }
    void attention(const Block& b, void* cache, bool picks) {
        const int H = b.attention->heads, K = b.attention->kv_heads, d = b.attention->head_dim, G = H / K;
        A* heads = product(b.qkv, stream(b.attention_norm, room(normed, (int64_t)rows * decoder.hidden)), qkv);
        if (b.q_norm.gain) for (int r = 0; r < rows; r++) {
            A* token = heads + (int64_t)r * (H + 2 * K) * d;
            if (b.norms_whole) {
                whole_norm(b.q_norm, token, K, G * d, (G + 2) * d);
                whole_norm(b.k_norm, token + G * d, K, d, (G + 2) * d);
                continue;
            }
            for (int h = 0; h < K; h++, token += (G + 2) * d) {
                norm(b.q_norm, token, nullptr, token, G, d);
                norm(b.k_norm, token + G * d, nullptr, token + G * d, 1, d);
            }
        }
        A* out = room(attended, (int64_t)rows * H * d);
        gristmill_attend(b.attention, &step, heads, decoder.type, cache, decoder.cache_type, out);
        product(b.output, picks ? pick_last(out, H * d) : out, added);
        add(b.attention_post_norm, b.multiplier);
    }
    void mlp(const Block& b) {
        const A* in = stream(b.mlp_norm, room(normed, (int64_t)rows * decoder.hidden));
        if (b.activation == SQUARED_RELU && b.down.quantized) {  // in fp32 up to the next quantization
            const int64_t n = (int64_t)rows * b.up.n;
            if ((int64_t)squared.size() < n) squared.resize(n);
            product(b.up, in, decoder.type, squared.data(), 0);
            gristmill_squared_relu(squared.data(), n, 0);
            product(b.down, squared.data(), 0, room(added, (int64_t)rows * b.down.n), decoder.type);
        } else if (b.activation == SQUARED_RELU) {
            A* inner = product(b.up, in, up);
            gristmill_squared_relu(inner, (int64_t)rows * b.up.n, decoder.type);
            product(b.down, inner, added);
        } else {
            const A* g = product(b.gate, in, gate);
            const A* u = b.up.weight ? product(b.up, in, up) : g + b.down.d;
            A* inner = room(b.up.weight ? gate : up, (int64_t)rows * b.down.d);
            const auto run = b.activation == SILU ? activate<SILU, A> : activate<GELU, A>;
            run(g, u, b.gate.n, inner, rows, b.down.d, step.threads);
            product(b.down, inner, added);
        }
        add(b.mlp_post_norm, b.multiplier);
    }
    void all(void* cache, A* out) {
        for (int i = 0; i < decoder.num_blocks; i++) {
            const Block& b = decoder.blocks[i];
            const bool picks = last && i == decoder.num_blocks - 1;
            if (b.attention) attention(b, cache, picks);
            else if (picks) pending = pick_last(pending, decoder.hidden);
            if (b.down.weight) mlp(b);
        }
        stream(decoder.final_norm, out);
    }
};

// Embeddings x [T, D], which become the residual stream; out, the states after the final norm, of all rows or of those of `last`.
extern "C" void gristmill_decode(const Decoder* d, const Step* s, void* cache, void* x, void* out, int rows, const int32_t* last, int num_last) {
    if (d->type == 0) Run<float>(*d, *s, rows, (float*)x, last, num_last).all(cache, (float*)out);
    else Run<bf16>(*d, *s, rows, (bf16*)x, last, num_last).all(cache, (bf16*)out);
}
