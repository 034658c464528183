// What this instruction set offers, its functions for tests, and the probe of its peak.
#include <time.h>

#include "vmath.h"

namespace prunevit {
namespace PRUNEVIT_ISA {

Step* norm_linear(const NormLinear&);
Step* linear_residual(const LinearResidual&);
Step* fused_mlp(const FusedMlp&);
Step* ragged_attention(const RaggedAttention&);
Step* token_scores(const TokenScores&);
Step* patch_embed(const PatchEmbed&);
Step* pool_head(const PoolHead&);
const Kernels& table();

namespace {

using Function = vf (*)(vf);

Function named(const char* name) {
    if (strcmp(name, "exp2") == 0) return exp2;
    if (strcmp(name, "sigmoid2") == 0) return sigmoid2;
    if (strcmp(name, "gelu") == 0) return gelu;
    if (strcmp(name, "gelu_tanh") == 0) return gelu_tanh;
    if (strcmp(name, "quick_gelu") == 0) return quick_gelu;
    if (strcmp(name, "relu") == 0) return relu;
    return nullptr;
}

bool apply(const char* name, const float* x, float* y, int64_t count) {
    const Function function = named(name);
    if (function == nullptr) return false;
    for (int64_t i = 0; i < count; i += lanes) {
        const int n = count - i < lanes ? (int)(count - i) : (int)lanes;
        store_first(y + i, function(load_first(x + i, n)), n);
    }
    return true;
}

enum { chains = 12, steps = 64 };

// Multiply-adds on registers only, enough of them in flight to fill the units.
double fma_seconds(int64_t rounds) {
    vf acc[chains];
    for (int i = 0; i < chains; ++i) acc[i] = splat(1.0f + (float)i);
    vf by = splat(0.999f), add = splat(0.001f);
    asm volatile("" : : "m"(by), "m"(add) : "memory");
    timespec start, stop;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (int64_t r = 0; r < rounds * steps; ++r) {
#pragma GCC unroll 16
        for (int i = 0; i < chains; ++i) acc[i] = acc[i] * by + add;
    }
    clock_gettime(CLOCK_MONOTONIC, &stop);
    for (int i = 0; i < chains; ++i) asm volatile("" : : "m"(acc[i]));
    return (double)(stop.tv_sec - start.tv_sec) + 1e-9 * (double)(stop.tv_nsec - start.tv_nsec);
}

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
const Kernels all = {TEXT(PRUNEVIT_ISA),
                     lanes,
                     panel,
                     norm_linear,
                     linear_residual,
                     fused_mlp,
                     ragged_attention,
                     token_scores,
                     patch_embed,
                     pool_head,
                     apply,
                     fma_seconds,
                     2.0 * chains * steps * lanes};

}  // namespace

const Kernels& table() { return all; }

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
