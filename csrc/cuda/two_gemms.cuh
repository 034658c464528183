// The MLP in two launches, for widths whose fc2 sums or tiles do not fit one block. No limit on E.
//
// expand: hidden = act(LN(x) W1ᵀ + b1); x is normalised on its way into shared memory.
// contract: x += γ (hidden W2ᵀ + b2), or fp32 sums of a split of the hidden width.
// Both walk over panels of 64 columns of K in a ring of three stages.
#pragma once

#include "epilogue.cuh"
#include "rows.cuh"

namespace prunevit::mlp {

constexpr int kGemmUnits = kGemmColumns / kUnit / kWarpsAlongColumns;  // units of 16 columns a warp owns

// Rows of a packed weight panel, row `first` on, as many as the tile is wide or as there are.
PRUNEVIT_DEVICE void copy_rows(uint32_t to, const unsigned char* from, int rows, int thread) {
    for (int at = thread * kPieceBytes; at < rows * kRowBytes; at += kThreads * kPieceBytes) {
        copy_async(to + at, from + at);
    }
}

template <Dtype D, int MT>
__global__ void __launch_bounds__(kThreads, 2) expand(const __grid_constant__ Arguments a) {
    constexpr int kRows = 32 * MT;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int row0 = blockIdx.x * kRows, warp_row0 = warp_row(warp) * 16 * MT;
    const int first_unit = warp_column(warp) * kGemmUnits;
    const int panels = a.shape.in_panels();
    const int tiles = ceil_div(a.shape.chunks(), 2), mine = ceil_div(tiles - static_cast<int>(blockIdx.y), gridDim.y);
    unsigned char* const shared = shared_memory();
    const uint32_t base = shared_address(shared);
    auto* const statistics = reinterpret_cast<Statistics*>(shared + gemm_shared_bytes(kRows)) - kRows;

    // step i of this block: panel i % panels of its (i / panels)-th tile of 128 hidden columns
    const int steps = mine * panels;
    const auto tile_of = [&](int i) { return static_cast<int>(blockIdx.y + i / panels * gridDim.y); };
    const auto copy_weights = [&](int i) {
        if (i < steps) {
            const uint32_t to = base + i % kGemmStages * gemm_stage_bytes(kRows) + kRows * kRowBytes;
            for (int half = 0; half < 2; ++half) {
                const int chunk = 2 * tile_of(i) + half;
                if (chunk >= a.shape.chunks()) break;
                copy_rows(to + half * static_cast<int>(w1_panel_bytes()),
                          a.w1 + chunk * w1_chunk_bytes(a.shape) + i % panels * w1_panel_bytes(), kChunk, thread);
            }
        }
        commit_copies();
    };
    // eight threads a row, one piece each; a panel of x waits in registers while the one before is multiplied
    Piece waiting[MT];
    const auto load_x = [&](int i) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            waiting[m] =
                load_piece(a, row0 + m * 32 + thread / 8, i % panels * kPanel + thread % 8 * 8, a.reads, a.shape.in);
        }
    };
    const auto store_x = [&](int i) {
        unsigned char* const to = shared + i % kGemmStages * gemm_stage_bytes(kRows);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const int row = m * 32 + thread / 8;
            *reinterpret_cast<Piece*>(to + piece_offset(row, thread % 8)) =
                normalise<D>(waiting[m], statistics[row], i % panels * kPanel + thread % 8 * 8, a.shape.in);
        }
    };

    copy_weights(0);
    copy_weights(1);
    await_launches();
#pragma unroll
    for (int m = 0; m < MT; ++m) {
        const int row = m * 32 + thread / 8;
        const auto piece_at = [&](int c) { return load_piece(a, row0 + row, c, nullptr, a.shape.embed); };
        const Statistics s = row_statistics<D>(a.shape.embed, a.eps, thread % 8, piece_at);
        if (thread % 8 == 0) statistics[row] = s;
    }
    __syncthreads();
    load_x(0);
    store_x(0);

    float sums[MT][2 * kGemmUnits][4] = {};
    for (int i = 0; i < steps; ++i) {
        wait_copies<1>();
        __syncthreads();  // stage i is here for all; nobody reads stage i − 1 any more
        copy_weights(i + 2);
        if (i + 1 < steps) load_x(i + 1);
        const int panel = i % panels, left = a.shape.in_steps() - panel * 4;
        const int units = a.shape.hidden_padded() / kUnit - tile_of(i) * (kGemmColumns / kUnit);
        const uint32_t stage = base + i % kGemmStages * gemm_stage_bytes(kRows);
        multiply<D, MT, kGemmUnits>(sums, {stage, kRows}, warp_row0, {stage + kRows * kRowBytes, kGemmColumns},
                                    first_unit, 1, units, left < 4 ? left : 4, lane);
        if (i + 1 < steps) store_x(i + 1);
        if (panel + 1 < panels) continue;

#pragma unroll
        for (int n = 0; n < 2 * kGemmUnits; ++n) {
            const int column = first_unit * kUnit + n * 8 + c_place(lane, 0).column;
            const int out = tile_of(i) * kGemmColumns + column;
            const bool live = out < a.shape.hidden_padded();
            const float b1[2] = {live ? a.b1[out] : 0.0f, live ? a.b1[out + 1] : 0.0f};
            float v[MT * 4];
#pragma unroll
            for (int j = 0; j < MT * 4; ++j) {
                v[j] = sums[j / 4][n][j % 4] + b1[j % 2];
                sums[j / 4][n][j % 4] = 0.0f;
            }
            activate(v, a.act);
#pragma unroll
            for (int j = 0; j < MT * 4; j += 2) {
                const int row = row0 + warp_row0 + j / 4 * 16 + c_place(lane, j % 4).row;
                if (live && row < a.shape.rows) {
                    *reinterpret_cast<uint32_t*>(a.hidden + int64_t{row} * a.shape.hidden_padded() + out) =
                        narrow<D>(v[j], v[j + 1]);
                }
            }
        }
    }
}

template <Dtype D, int MT>
__global__ void __launch_bounds__(kThreads, 2) contract(const __grid_constant__ Arguments a) {
    constexpr int kRows = 32 * MT;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    // blocks of the same rows follow each other: all but the first find the activations in the L2 cache
    const int tiles = ceil_div(a.shape.out, kGemmColumns), column0 = blockIdx.x % tiles * kGemmColumns;
    const int row0 = blockIdx.x / tiles * kRows, warp_row0 = warp_row(warp) * 16 * MT;
    const int first_unit = warp_column(warp) * kGemmUnits;
    const int left = a.shape.out_padded() - column0, columns = left < kGemmColumns ? left : kGemmColumns;
    const Range chunks = split_range(a.shape.chunks(), a.splits, blockIdx.y);
    unsigned char* const shared = shared_memory();
    const uint32_t base = shared_address(shared);
    const auto copy = [&](int chunk) {
        if (chunk < chunks.end) {
            const uint32_t to = base + (chunk - chunks.begin) % kGemmStages * gemm_stage_bytes(kRows);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                const int row = m * 32 + thread / 8, piece = thread % 8;
                const int from = chunk * kChunk + piece * kPieceColumns;
                const bool valid = row0 + row < a.shape.rows && from < a.shape.hidden_padded();
                const int64_t at = valid ? int64_t{row0 + row} * a.shape.hidden_padded() + from : 0;
                copy_async(to + piece_offset(row, piece), a.hidden + at, valid ? kPieceBytes : 0);
            }
            copy_rows(to + kRows * kRowBytes, a.w2 + chunk * w2_chunk_bytes(a.shape) + int64_t{column0} * kRowBytes,
                      columns, thread);
        }
        commit_copies();
    };

    await_launches();
    copy(chunks.begin);
    copy(chunks.begin + 1);
    float sums[MT][2 * kGemmUnits][4] = {};
    for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
        wait_copies<1>();
        __syncthreads();
        copy(chunk + 2);
        const uint32_t stage = base + (chunk - chunks.begin) % kGemmStages * gemm_stage_bytes(kRows);
        multiply<D, MT, kGemmUnits>(sums, {stage, kRows}, warp_row0, {stage + kRows * kRowBytes, kGemmColumns},
                                    first_unit, 1, columns / kUnit, a.shape.chunk_units(chunk), lane);
    }
    wait_copies<0>();
    __syncthreads();

    float* const stage = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < MT * 2 * kGemmUnits * 2; ++i) {
        const int m = i / (4 * kGemmUnits), n = i / 2 % (2 * kGemmUnits), pair = i % 2 * 2;
        const Place place = c_place(lane, pair);
        const int row = warp_row0 + m * 16 + place.row, column = first_unit * kUnit + n * 8 + place.column;
        float* to = stage + row * stage_pitch(kGemmColumns) + column;
        if (a.splits > 1) {
            if (row0 + row >= a.shape.rows || column >= columns) continue;
            to =
                a.partial + (int64_t{blockIdx.y} * a.shape.rows + row0 + row) * a.shape.out_padded() + column0 + column;
        }
        to[0] = sums[m][n][pair];
        to[1] = sums[m][n][pair + 1];
    }
    if (a.splits > 1) return;
    __syncthreads();
    add_staged<D>(a, stage, row0, kRows, column0, kGemmColumns, thread, kThreads);
}

}  // namespace prunevit::mlp
