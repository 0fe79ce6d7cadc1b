// AdamW in one pass over memory: clipping, moments, weights, and the weights' copies in the type that the model computes in.

#include "vectors.h"

#include <cmath>

static const int64_t PIECE = 4096; // numbers that stay in the nearest cache from the update to the copy

struct AdamW {
    float lr, beta1, beta2, eps, weight_decay, clip; // clip: factor of the gradients
    float correction1, correction2;                  // 1 - beta^step
};

// As torch's fused kernel: each number by itself, so that threads change no bit.
extern "C" void gristmill_adamw(const AdamW* settings, float* weight, const float* grad, float* mean, float* square, bf16* copy, int64_t size, int threads) {
    const AdamW s = *settings;
    const float keep = 1 - s.lr * s.weight_decay, step = s.lr / s.correction1, scale = std::sqrt(s.correction2);
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
    for (int64_t start = 0; start < size; start += PIECE) {
        const int64_t end = start + PIECE < size ? start + PIECE : size;
        for (int64_t i = start; i < end; i++) {
            const float g = grad[i] * s.clip;
            const float m = mean[i] + (1 - s.beta1) * (g - mean[i]), v = square[i] * s.beta2 + (1 - s.beta2) * g * g;
            mean[i] = m;
            square[i] = v;
            weight[i] = weight[i] * keep - step * m / (std::sqrt(v) / scale + s.eps);
        }
        if (copy) for (int64_t i = start; i < end; i++) put(copy + i, weight[i]);
    }
}
