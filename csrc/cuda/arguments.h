// What a kernel is told: one small struct, passed by value.
#pragma once

#include "layout.h"

namespace prunevit::mlp {

enum class Dtype : int { fp16, bf16 };
enum class Act : int { gelu, gelu_tanh, quick_gelu, relu };

struct Arguments {
    Shape shape;
    uint16_t* x;  // [M, E], rows `pitch` elements apart, updated in place
    int64_t pitch;
    bool wide;                // rows of x start on 16 bytes: copies of 8 columns at a time
    const unsigned char* w1;  // packed as layout.h says
    const unsigned char* w2;
    const float* b1;     // [64 · chunks], zeros past F
    const float* b2;     // [out_padded], zeros past N
    const float* gamma;  // [out_padded], ones where there is no layer-scale
    const int* reads;    // [K] or null: all channels in order
    const int* writes;   // [N] or null
    float eps;
    Act act;
    int splits;        // CTAs along the hidden width
    int slots;         // weight tiles in the ring of wgmma, or of wgmma_gemms' first launch
    int tile_chunks;   // chunks of hidden columns in a tile of wgmma_gemms' first launch
    float* partial;    // [splits, M, out_padded] where splits > 1
    uint16_t* hidden;  // [M, hidden_padded] for two_gemms, images of shared memory for wgmma_gemms
};

}  // namespace prunevit::mlp
