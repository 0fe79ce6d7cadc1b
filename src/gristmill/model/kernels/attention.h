// What the attention kernels share: their arguments, the rotation, documents, and how tasks fall to threads.

#pragma once

#include "vectors.h"

#include <vector>

struct Attention {
    int32_t heads, kv_heads, head_dim, pairs, window, threads, num_documents, num_groups;
    float scale, cap;          // of scores; a cap of 0 is none
    const int32_t* documents;  // [N, 4]: first own token, own tokens, shared tokens, where those are
    const int32_t* groups;     // [groups + 1]: documents that share tokens follow the one that holds them
    const float *cos, *sin;    // [T, pairs]
};

// A head of one token, rotated (turn 1) or rotated back (-1), and scaled.
template <typename A, typename B> static inline void rotated(const A* in, B* out, int d, int pairs, const float* cos, const float* sin, float turn, float scale) {
    for (int i = 0; i < pairs; i += VL) {
        const int n = pairs - i;
        const vec c = some(cos + i, n), s = some(sin + i, n) * turn, x = some(in + i, n), y = some(in + i + pairs, n);
        keep(out + i, (x * c - y * s) * scale, n);
        keep(out + i + pairs, (y * c + x * s) * scale, n);
    }
    for (int i = 2 * pairs; i < d; i += VL) keep(out + i, some(in + i, d - i) * scale, d - i);
}

struct Scratch {
    std::vector<float> memory;
    size_t used = 0;
    void reset(size_t size) { used = 0; if (memory.size() < size) memory.resize(size); }
    float* take(size_t size) { float* p = memory.data() + used; used += size; return p; }
};

// A document seen by one key head: its keys are the n tokens at token(j), its rows (own token, query head) pairs.
struct Document {
    int start, own, shared, holder, n, rows;
    Document(const int32_t* p, int G) : start(p[0]), own(p[1]), shared(p[2]), holder(p[3]), n(own + shared), rows(own * G) {}
    int64_t token(int j) const { return j < shared ? holder + j : start + j - shared; }
};

// Each task is a group of documents and a key head, so that no two of them add to the same gradient.
template <typename Task> static void each(const Attention& a, const Task& task) {
    const int tasks = a.num_groups * a.kv_heads;
#pragma omp parallel if (a.threads > 1) num_threads(a.threads)
    {
        Scratch scratch;
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < tasks; i++)
            for (int n = a.groups[i / a.kv_heads]; n < a.groups[i / a.kv_heads + 1]; n++)
                task(Document(a.documents + 4 * (int64_t)n, a.heads / a.kv_heads), i % a.kv_heads, scratch);
    }
}
