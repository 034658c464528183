// What the ops take: plain structs of pointers, sizes and pitches (in floats). No Python, no torch, and no function with
// a loop: this header is read by code compiled for several instruction sets.
#pragma once
#include <stdint.h>

#include "pool.h"

namespace prunevit {

// rows x cols floats, `pitch` floats from one row to the next.
struct Matrix {
    float* data;
    int64_t rows, cols, pitch;
};

// batch images of rows x cols floats, `image` floats apart.
struct Tokens {
    float* data;
    int64_t batch, rows, cols, image, pitch;
};

// A linear map, its weight cut into panels of columns and blocks of k: each (block, panel) lies in memory as k rows of
// the panel's width. Every panel is `panel` vectors wide, the last one 1 to `panel` + 1. Padding is zero.
struct Linear {
    int out, in;
    int lanes, vectors;  // floats a vector; vectors that cover `out`
    int panel, panels;   // vectors a panel; panels
    int blocks;
    const int* k_start;   // [blocks + 1]
    const float* weight;  // block b at k_start[b] * vectors * lanes, then panel p at p * panel * lanes * (its k)
    const float* bias;    // [vectors * lanes]
    const float* gamma;   // [vectors * lanes], ones where there is none
    const int* reads;     // [in] or null: input i is channel reads[i]
    const int* writes;    // [out] or null: output i goes to channel writes[i]
};

enum class Activation { gelu, gelu_tanh, quick_gelu, relu };
enum class Pooling { token, tokens, avg, max, avgmax, none };
enum class Rule { max_attention, class_attention };

struct Head {
    int qk, v;                   // widths
    int q_at, k_at, v_at, o_at;  // columns
};

struct NormLinear {
    Matrix x, y;
    const Linear* linear;
    float eps;
};

struct LinearResidual {
    Matrix c, x;
    const Linear* linear;
};

struct FusedMlp {
    Matrix x;
    const Linear *fc1, *fc2;  // the blocks of fc2 are whole panels of fc1
    Activation act;
    float eps;
};

struct RaggedAttention {
    Tokens qkv, out;
    const Head* heads;  // in the order in which they are started
    int head_count;
    const int* gaps;  // pairs of first column and count: columns of out that belong to no head
    int gap_count;
};

struct TokenScores {
    Tokens qkv;
    Matrix scores;  // [batch, tokens]
    const Head* heads;
    int head_count;
    Rule rule;
    bool accumulate;  // add to scores instead of writing them
};

struct PatchEmbed {
    const float* images;  // [batch, channels, height, width]
    int64_t batch, channels, height, width, patch_h, patch_w;
    Tokens x;
    const Linear* linear;
    const float* positions;  // [patches, E]
    const float* prefix;     // [prefix_count, E]
    int64_t prefix_count;
    const float *embed_norm, *pre_norm;  // [2, E] or null
    float eps;
};

struct PoolHead {
    Tokens x;
    Matrix out;  // pooling none: [batch * rows, classes]
    Pooling pooling;
    int64_t prefix;
    float eps;
    const float *norm, *fc_norm;  // [2, E] or null
    const Linear* linear;         // null: out is the pooled features
};

struct Need {
    int64_t each, shared;  // floats of scratch
};

// An op bound to its buffers.
struct Step {
    virtual ~Step();
    virtual Need need(int threads) const = 0;
    virtual void run(Pool& pool) const = 0;
};

// What one instruction set offers.
struct Kernels {
    const char* name;
    int lanes, panel;
    Step* (*norm_linear)(const NormLinear&);
    Step* (*linear_residual)(const LinearResidual&);
    Step* (*fused_mlp)(const FusedMlp&);
    Step* (*ragged_attention)(const RaggedAttention&);
    Step* (*token_scores)(const TokenScores&);
    Step* (*patch_embed)(const PatchEmbed&);
    Step* (*pool_head)(const PoolHead&);
    // For tests: exp2, sigmoid2, gelu and the like; false for a name that is none of them.
    bool (*apply)(const char* function, const float* x, float* y, int64_t count);
    double (*fma_seconds)(int64_t rounds);  // seconds that `rounds` rounds of fma_flops operations take
    double fma_flops;
};

// The kernels of the best instruction set of this machine, or of the one that PRUNEVIT_CPU_ISA names.
// Throws IsaError (isa.h).
const Kernels& kernels();

}  // namespace prunevit
