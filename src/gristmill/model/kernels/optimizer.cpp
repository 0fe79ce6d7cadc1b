// AdamW in one pass over memory: clipping, moments, weights, and the weights' copies in the type that the model computes in.

#include "vectors.h"

#include <algorithm>
#include <cmath>

static const int64_t PIECE = 4096; // numbers that stay in the nearest cache from the update to the copy

struct AdamW {
    float lr, rest1, beta2, rest2, eps, weight_decay, clip; // rest: 1 - beta; clip: factor of the gradients
};

struct Part { // a parameter
    float* weight;
    const float* grad;
    float *mean, *square;
    bf16* copy; // or null
    int64_t size;
    float correction1, correction2; // 1 - beta^step
    const int64_t* rows;            // in order, those that the gradient has; null: all
    int64_t num_rows, width;
};

// Numbers from start to end, whose gradients begin at `grad`; null: they are zero.
template <bool HAS_GRAD>
static void update(const AdamW& s, const Part& x, const float* grad, int64_t start, int64_t end) {
    const float keep = 1 - s.lr * s.weight_decay, step = s.lr / x.correction1, scale = std::sqrt(x.correction2);
    for (int64_t i = start; i < end; i++) {
        const float g = HAS_GRAD ? grad[i - start] * s.clip : 0.0f;
        const float m = x.mean[i] + s.rest1 * (g - x.mean[i]), v = x.square[i] * s.beta2 + s.rest2 * g * g;
        x.mean[i] = m;
        x.square[i] = v;
        x.weight[i] = x.weight[i] * keep - step * m / (std::sqrt(v) / scale + s.eps);
    }
    if (x.copy) for (int64_t i = start; i < end; i++) put(x.copy + i, x.weight[i]);
}

static void update_rows(const AdamW& s, const Part& x, int64_t start, int64_t end) {
    const int64_t* row = std::lower_bound(x.rows, x.rows + x.num_rows, start);
    for (int64_t i = start; i < end; i++) {
        if (row < x.rows + x.num_rows && *row == i) {
            update<true>(s, x, x.grad + (row - x.rows) * x.width, i * x.width, (i + 1) * x.width);
            row++;
        } else update<false>(s, x, nullptr, i * x.width, (i + 1) * x.width);
    }
}

// Each number by itself, so that threads change no bit.
extern "C" void gristmill_adamw(const AdamW* settings, const Part* parts, int count, int threads) {
    for (int n = 0; n < count; n++) {
        const Part& x = parts[n];
        const int64_t size = x.rows ? x.size / x.width : x.size, step = x.rows ? std::max<int64_t>(1, PIECE / x.width) : PIECE;
        const int64_t pieces = (size + step - 1) / step;
#pragma omp parallel for if (threads > 1 && pieces > 1) num_threads(threads) schedule(static)
        for (int64_t piece = 0; piece < pieces; piece++) {
            const int64_t start = piece * step, end = std::min(size, start + step);
            if (x.rows) update_rows(*settings, x, start, end);
            else update<true>(*settings, x, x.grad + start, start, end);
        }
    }
}
