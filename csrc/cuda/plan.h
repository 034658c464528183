// Which kernel runs a shape, and how it is launched. Host only.
#pragma once

#include <stdexcept>
#include <string>

#include "arguments.h"

namespace prunevit::mlp {

enum class Kernel : int { fused, split, two_gemms, wgmma, wgmma_gemms };

inline const char* name_of(Kernel kernel) {
    constexpr const char* names[] = {"fused", "split", "two_gemms", "wgmma", "wgmma_gemms"};
    return names[static_cast<int>(kernel)];
}

struct Device {
    int sm;  // 80, 86, 89, 90, …
    int multiprocessors;
    int shared_limit;    // bytes of shared memory that one block may have
    bool hopper = true;  // whether this build has the kernels for sm_90a
};

struct Plan {
    Kernel kernel;
    int mt, nu;          // template arguments: 32 · mt rows a block, nu units of 16 output columns a warp
    int expand_mt;       // the same for the first of two GEMMs, which also holds a panel of x in registers
    int blocks;          // of wgmma: each takes every blocks-th tile of rows
    int splits;          // CTAs along the hidden width
    int slots;           // weight tiles in a ring of wgmma's, whose nu is the columns as instantiated
    int expand_columns;  // blocks along F of the first of two GEMMs
    int tile_chunks;     // chunks of the hidden width in a tile of theirs, where that varies
    int shared;          // bytes a block, of the launch that takes most
    int64_t partial_bytes, hidden_bytes;
};

// The choice. Read from top to bottom: the first row that the GPU and the shape fit, and whose kernel takes the shape,
// names the kernel. No row has been measured yet: all follow the traffic model in docs/performance-gpu-mlp.md.
// bench/mlp_rules.py prints the rows that measurements imply; they go on top.
struct Rule {
    int sm_from, sm_to;
    float max_waves;  // tiles of 64 rows, over multiprocessors
    int max_embed;
    float max_ratio;  // F / E
    Kernel kernel;
};
constexpr float kAny = 1e30f;
constexpr Rule kRules[] = {
    {80, 999, 0.75f, 192, 8.0f, Kernel::split},  // row tiles alone would leave SMs idle
    {80, 999, kAny, 192, 8.0f, Kernel::fused},   // tiles of 80 KB: two blocks an SM, x read and written once
    {80, 999, 0.75f, 384, 4.0f, Kernel::split},
    {80, 999, kAny, 384, 4.0f, Kernel::fused},  // one block an SM, still no hidden traffic
    {80, 999, 0.75f, 512, 2.5f, Kernel::split},
    {80, 999, kAny, 512, 2.5f, Kernel::fused},  // the widest that fc2's sums fit
    {80, 999, kAny, 1 << 30, kAny, Kernel::two_gemms},
};

// The instantiations of fused_mma. The unit count is of 16 output columns a warp, with four warps along the columns.
struct FusedShape {
    int mt, nu;
};
constexpr FusedShape kFusedShapes[] = {{4, 3}, {2, 3}, {2, 6}, {2, 8}, {1, 8}};
constexpr int kFusedMaxOut = 8 * kWarpsAlongColumns * kUnit;

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
                                    std::to_string(fused_shared(32, s).bytes) +
                                    " bytes of shared memory, the GPU has " + std::to_string(d.shared_limit));
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

// Blocks of so much shared memory that fit an SM, two at most: each takes a kilobyte more than it asks for, and one may
// have all but that.
inline int blocks_an_sm(int shared, const Device& d) { return 2 * (shared + 1024) <= d.shared_limit + 1024 ? 2 : 1; }

inline Plan plan_two_gemms(const Shape& s, const Device& d) {
    Plan plan{};
    plan.kernel = Kernel::two_gemms;
    const int out_tiles = ceil_div(s.out, kGemmColumns);
    plan.mt = ceil_div(s.rows, 128) * out_tiles >= d.multiprocessors ? 4 : 2;
    plan.expand_mt = plan.mt == 4 ? 3 : 2;
    const int row_tiles = ceil_div(s.rows, 32 * plan.mt), hidden_tiles = ceil_div(s.hidden, kGemmColumns);
    const int at_once = d.multiprocessors * blocks_an_sm(gemm_shared_bytes(32 * plan.expand_mt), d);
    const int wanted = ceil_div(at_once, ceil_div(s.rows, 32 * plan.expand_mt));
    plan.expand_columns = wanted < hidden_tiles ? wanted : hidden_tiles;
    plan.splits = even_splits(row_tiles * out_tiles, s.chunks(), d);
    plan.shared = gemm_shared_bytes(32 * plan.mt);
    plan.partial_bytes = plan.splits > 1 ? int64_t{plan.splits} * s.rows * s.out_padded() * 4 : 0;
    plan.hidden_bytes = int64_t{s.rows} * s.hidden_padded() * 2;
    return plan;
}

inline void expect_hopper(Kernel kernel, const Shape& s, const Device& d) {
    const std::string who = std::string("fused_mlp kernel '") + name_of(kernel) + "'";
    if (d.sm != 90) {
        throw std::invalid_argument(who + ": " + describe(s) + " needs sm_90, the GPU is sm_" + std::to_string(d.sm));
    }
    if (!d.hopper) throw std::invalid_argument(who + " is not in this build: PRUNEVIT_CUDA_ARCHS left out 90a");
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
    expect_hopper(Kernel::wgmma, s, d);
    if (s.embed > kFusedWidestEmbed || plan.slots < 2) {
        throw std::invalid_argument("fused_mlp kernel 'wgmma': " + describe(s) + " needs E <= 512, N <= 384 and two " +
                                    "weight tiles beside 128 rows in shared memory, of which the GPU has " +
                                    std::to_string(d.shared_limit) + " bytes");
    }
    plan.blocks = row_tiles(s) < d.multiprocessors ? row_tiles(s) : d.multiprocessors;
    plan.splits = 1;
    plan.shared = wgmma_shared(plan.nu, s, plan.slots).bytes;
    return plan;
}

// Columns of a tile of the second GEMM: what is copied in all, 256 rows of A beside them each time, decides.
inline int contract_columns(const Shape& s) {
    int best = 0;
    const auto rows_copied = [&](int columns) { return ceil_div(s.out, columns) * (kContractRows + columns); };
    for (const int columns : kContractColumns) {
        if (best == 0 || rows_copied(columns) < rows_copied(best)) best = columns;
    }
    return best;
}

// Blocks along the hidden width, and tiles of two chunks or one: waves of blocks times a block's length, in chunks.
// Normalising the rows counts as much as two chunks.
inline void spread_hidden(Plan& plan, const Shape& s, const Device& d) {
    int64_t least = 0;
    for (int each = kExpandMostChunks; each >= 1; --each) {
        const int tiles = ceil_div(s.chunks(), each);
        for (int blocks = 1; blocks <= tiles && blocks <= d.multiprocessors; ++blocks) {
            const int chunks = each * ceil_div(tiles, blocks), length = 2 + (chunks < s.chunks() ? chunks : s.chunks());
            const int64_t waves = (int64_t{row_tiles(s)} * blocks + d.multiprocessors - 1) / d.multiprocessors;
            if (least != 0 && waves * length >= least) continue;
            least = waves * length;
            plan.expand_columns = blocks;
            plan.tile_chunks = each;
        }
    }
}

inline Plan plan_wgmma_gemms(const Shape& s, const Device& d) {
    Plan plan{};
    plan.kernel = Kernel::wgmma_gemms;
    plan.mt = kContractRows / 32;
    plan.expand_mt = kTileRows / 32;
    plan.nu = contract_columns(s);
    plan.slots = kExpandMostSlots;
    while (plan.slots > 0 && expand_shared(s, plan.slots).bytes > d.shared_limit) --plan.slots;
    expect_hopper(Kernel::wgmma_gemms, s, d);
    if (s.embed > kExpandMaxEmbed || plan.slots < 2 || contract_shared_bytes(plan.nu) > d.shared_limit) {
        throw std::invalid_argument("fused_mlp kernel 'wgmma_gemms': " + describe(s) + " needs E <= 768 and " +
                                    "227 KB of shared memory, the GPU has " + std::to_string(d.shared_limit) +
                                    " bytes; 'two_gemms' takes any E");
    }
    spread_hidden(plan, s, d);
    plan.splits = even_splits(ceil_div(s.rows, kContractRows) * ceil_div(s.out, plan.nu), s.chunks(), d);
    const int first = expand_shared(s, plan.slots).bytes, second = contract_shared_bytes(plan.nu);
    plan.shared = first > second ? first : second;
    plan.partial_bytes = plan.splits > 1 ? int64_t{plan.splits} * s.rows * s.out_padded() * 4 : 0;
    plan.hidden_bytes = int64_t{row_tiles(s)} * s.chunks() * kHiddenTileBytes;
    return plan;
}

inline Plan plan_of(Kernel kernel, const Shape& s, const Device& d) {
    switch (kernel) {
        case Kernel::fused: return plan_fused(s, d);
        case Kernel::split: return plan_split(s, d);
        case Kernel::two_gemms: return plan_two_gemms(s, d);
        case Kernel::wgmma: return plan_wgmma(s, d);
        case Kernel::wgmma_gemms: return plan_wgmma_gemms(s, d);
    }
    throw std::invalid_argument("fused_mlp has no kernel of number " + std::to_string(static_cast<int>(kernel)));
}

inline bool takes(Kernel kernel, const Shape& s, const Device& d) {
    // a 64-row tile at least: with less, the two GEMMs' 128-column tiles reuse more of what they load
    if (kernel == Kernel::fused) return fused_fits(2, s, d);
    try {
        plan_of(kernel, s, d);
        return true;
    } catch (const std::invalid_argument&) {
        return false;
    }
}

inline Kernel chosen_kernel(const Shape& s, const Device& d) {
    const float waves = static_cast<float>(ceil_div(s.rows, 64)) / static_cast<float>(d.multiprocessors);
    const float ratio = static_cast<float>(s.hidden) / static_cast<float>(s.embed);
    for (const Rule& rule : kRules) {
        const bool here = rule.sm_from <= d.sm && d.sm <= rule.sm_to && waves <= rule.max_waves;
        if (!here || s.embed > rule.max_embed || ratio > rule.max_ratio) continue;
        if (takes(rule.kernel, s, d)) return rule.kernel;
    }
    return Kernel::two_gemms;
}

}  // namespace prunevit::mlp
