// Which kernel runs a shape, and how it is launched. Host only.
#pragma once

#include <stdexcept>
#include <string>

#include "arguments.h"

namespace prunevit::mlp {

enum class Kernel : int { fused, split, two_gemms, wgmma };

inline const char* name_of(Kernel kernel) {
    constexpr const char* names[] = {"fused", "split", "two_gemms", "wgmma"};
    return names[static_cast<int>(kernel)];
}

struct Device {
    int sm;               // 80, 86, 89, 90, …
    int multiprocessors;
    int shared_limit;     // bytes of shared memory that one block may have
};

struct Plan {
    Kernel kernel;
    int mt, nu;           // template arguments: 32 · mt rows a block, nu units of 16 output columns a warp
    int expand_mt;        // the same for the first of two GEMMs, which also holds a panel of x in registers
    int splits;           // CTAs along the hidden width
    int slots;            // weight tiles in wgmma's ring, whose nu is N as instantiated
    int expand_columns;   // blocks along F of the first of two GEMMs
    int shared;           // bytes a block
    int64_t partial_bytes, hidden_bytes;
};

// The choice. Read from top to bottom: the first row that the GPU and the shape fit names the kernel. `fused` gives
// way to `split` where its row tiles would leave SMs idle, and to `two_gemms` where its tiles do not fit the GPU.
// No row has been measured yet: all follow the traffic model in docs/performance-gpu-mlp.md.
struct Rule {
    int sm_from, sm_to;
    int max_embed;
    float max_ratio;      // F / E
    Kernel kernel;
};
constexpr Rule kRules[] = {
    {80, 999, 192, 8.0f, Kernel::fused},         // tiles of 80 KB: two blocks an SM, x read and written once
    {80, 999, 384, 4.0f, Kernel::fused},         // one block an SM, still no hidden traffic
    {80, 999, 512, 2.5f, Kernel::fused},         // the widest that fc2's sums fit
    {80, 999, 1 << 30, 1e30f, Kernel::two_gemms},
};

// The instantiations of fused_mma. The unit count is of 16 output columns a warp, with four warps along the columns.
struct FusedShape {
    int mt, nu;
};
constexpr FusedShape kFusedShapes[] = {{4, 3}, {2, 3}, {2, 6}, {2, 8}, {1, 8}};
constexpr int kFusedMaxOut = 8 * kWarpsAlongColumns * kUnit;
constexpr int kFusedWidestEmbed = 512;  // kFusedMaxEmbed of pieces.cuh

inline std::string describe(const Shape& s) {
    return "M=" + std::to_string(s.rows) + " E=" + std::to_string(s.embed) + " K=" + std::to_string(s.in) +
           " F=" + std::to_string(s.hidden) + " N=" + std::to_string(s.out);
}

inline bool fused_fits(int mt, const Shape& s, const Device& d) {
    return s.embed <= kFusedWidestEmbed && s.out <= kFusedMaxOut && fused_shared(32 * mt, s).bytes <= d.shared_limit;
}

// As many splits as fill the chip once, no more than leave each split the same number of whole chunks.
inline int even_splits(int blocks, int chunks, const Device& d) {
    const int most = d.multiprocessors / blocks;
    if (most <= 1) return 1;
    return ceil_div(chunks, ceil_div(chunks, most < chunks ? most : chunks));
}

inline Plan plan_fused(const Shape& s, const Device& d) {
    Plan plan{};
    plan.kernel = Kernel::fused;
    plan.splits = 1;
    for (const FusedShape& shape : kFusedShapes) {
        if (shape.nu * kWarpsAlongColumns * kUnit < s.out || !fused_fits(shape.mt, s, d)) continue;
        // the tallest tile that still gives every SM a block; the last fitting one otherwise
        plan.mt = shape.mt;
        plan.nu = shape.nu;
        if (ceil_div(s.rows, 32 * shape.mt) >= d.multiprocessors) break;
    }
    if (plan.mt == 0) {
        throw std::invalid_argument("fused_mlp kernel 'fused': " + describe(s) + " needs E <= 512, N <= 512 and " +
                                    std::to_string(fused_shared(32, s).bytes) + " bytes of shared memory, the GPU has " +
                                    std::to_string(d.shared_limit));
    }
    plan.shared = fused_shared(32 * plan.mt, s).bytes;
    return plan;
}

inline Plan plan_split(const Shape& s, const Device& d) {
    if (!fused_fits(1, s, d)) plan_fused(s, d);  // raises, with the reason
    Plan plan{};
    plan.kernel = Kernel::split;
    plan.mt = 1;
    plan.nu = 8;
    plan.splits = even_splits(ceil_div(s.rows, 32), s.chunks(), d);
    plan.shared = fused_shared(32, s).bytes;
    plan.partial_bytes = plan.splits > 1 ? int64_t{plan.splits} * s.rows * s.out_padded() * 4 : 0;
    return plan;
}

inline Plan plan_two_gemms(const Shape& s, const Device& d) {
    Plan plan{};
    plan.kernel = Kernel::two_gemms;
    const int out_tiles = ceil_div(s.out, kGemmColumns);
    plan.mt = ceil_div(s.rows, 128) * out_tiles >= d.multiprocessors ? 4 : 2;
    plan.expand_mt = plan.mt == 4 ? 3 : 2;
    const int row_tiles = ceil_div(s.rows, 32 * plan.mt), hidden_tiles = ceil_div(s.hidden, kGemmColumns);
    const int wanted = ceil_div(2 * d.multiprocessors, ceil_div(s.rows, 32 * plan.expand_mt));  // two blocks an SM
    plan.expand_columns = wanted < hidden_tiles ? wanted : hidden_tiles;
    plan.splits = even_splits(row_tiles * out_tiles, s.chunks(), d);
    plan.shared = gemm_shared_bytes(32 * plan.mt);
    plan.partial_bytes = plan.splits > 1 ? int64_t{plan.splits} * s.rows * s.out_padded() * 4 : 0;
    plan.hidden_bytes = int64_t{s.rows} * s.hidden_padded() * 2;
    return plan;
}

// Slots of the weight ring: as many as fit, two at least.
inline int wgmma_slots(int columns, const Shape& s, const Device& d) {
    int slots = kWgmmaMostSlots;
    while (slots > 0 && wgmma_shared(columns, s, slots).bytes > d.shared_limit) --slots;
    return slots;
}

inline Plan plan_wgmma(const Shape& s, const Device& d) {
    Plan plan{};
    plan.kernel = Kernel::wgmma;
    for (const int columns : kWgmmaColumns) {
        if (columns >= s.out && plan.nu == 0) plan.nu = columns;
    }
    plan.slots = plan.nu == 0 ? 0 : wgmma_slots(plan.nu, s, d);
    if (d.sm != 90 || s.embed > kFusedWidestEmbed || plan.slots < 2) {
        throw std::invalid_argument("fused_mlp kernel 'wgmma': " + describe(s) + " needs sm_90, E <= 512, N <= 384 and " +
                                    "two weight tiles beside 128 rows in shared memory; the GPU is sm_" +
                                    std::to_string(d.sm) + " with " + std::to_string(d.shared_limit) + " bytes");
    }
    plan.splits = 1;
    plan.shared = wgmma_shared(plan.nu, s, plan.slots).bytes;
    return plan;
}

inline Kernel chosen_kernel(const Shape& s, const Device& d) {
    for (const Rule& rule : kRules) {
        const bool here = rule.sm_from <= d.sm && d.sm <= rule.sm_to && s.embed <= rule.max_embed;
        if (!here || static_cast<float>(s.hidden) > rule.max_ratio * static_cast<float>(s.embed)) continue;
        if (rule.kernel != Kernel::fused) return rule.kernel;
        if (ceil_div(s.rows, 64) < d.multiprocessors * 3 / 4 && fused_fits(1, s, d)) return Kernel::split;
        // a 64-row tile at least: with less, the two GEMMs' 128-column tiles reuse more of what they load
        return fused_fits(2, s, d) ? Kernel::fused : Kernel::two_gemms;
    }
    return Kernel::two_gemms;
}

inline Plan plan_of(Kernel kernel, const Shape& s, const Device& d) {
    switch (kernel) {
        case Kernel::fused: return plan_fused(s, d);
        case Kernel::split: return plan_split(s, d);
        case Kernel::two_gemms: return plan_two_gemms(s, d);
        case Kernel::wgmma: return plan_wgmma(s, d);
    }
    throw std::invalid_argument("fused_mlp has no kernel of number " + std::to_string(static_cast<int>(kernel)));
}

}  // namespace prunevit::mlp
