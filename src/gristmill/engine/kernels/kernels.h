// What the engine's kernels are told, mirrored by library.py, and what they call of each other.

#pragma once

#include "vectors.h"

struct Layer {
    int64_t k_offset, v_offset, s_offset;         // in elements from a block's begin
    int32_t heads, kv_heads, head_dim, pairs, window;  // tokens that a token sees, itself included; 0 for all
    float scale, cap;                             // of scores; 0 for 1 / sqrt(head_dim), and for none
    int32_t padding;
    const float *cos, *sin;                       // [positions, pairs]
};
struct Step {
    int32_t num_seqs, table_stride, threads, num_decoding;  // num_decoding: the first so many sequences are attended row by row
    int64_t block_stride;                                // elements between two blocks in the cache
    const int32_t *query_start, *seq_lens, *slots;       // of each sequence: first token of the step (n + 1 of them), positions with this step's
    const int32_t* block_tables;                         // [slots, table_stride]
};

struct Product {
    const void *x, *weight, *scale, *row_scale;  // row_scale: of activations that are int8 already
    const float* bias;
    void* out;
    int32_t activations, kind, out_type;  // float32 0, bfloat16 1, int8 2; float32 0, bf16 1, int8 2, int4 3; float32 0, bfloat16 1
    int32_t rows, n, d, threads;
};

// Queries of a sequence that read the same keys, in rows (token, query head).
struct Queries {
    const bf16* q;                                // [rows, d] rotated; rows of whole tiles, with zeros behind
    const int32_t* table;                         // the sequence's blocks
    int64_t block_stride, k_at, v_at;
    int rows, group, d, first, window;            // query heads of a token, position of the first
    float scale, cap;
};

bool tile_product(const Product& p);  // of activations in bf16; whether there is one
void tile_attend(const Queries& q, const void* cache, bf16* out, int64_t stride);  // of a prompt's tokens in bf16, whose outputs are `stride` apart
extern "C" int gristmill_has_tiles();

extern "C" {
void gristmill_attend(const Layer* l, const Step* s, const void* qkv, int activations, void* cache, int type, void* out);
void gristmill_product(const Product* p);
void gristmill_norm(void* x, const void* delta, const float* gain, const float* bias, void* out, int8_t* small, float* scale, int rows, int n, float eps,
                    int centred, int type);
void gristmill_squared_relu(void* x, int64_t n, int type);
void gristmill_quantize(const void* x, int8_t* out, float* scale, int rows, int n, int type);
}
