// The whole MLP in one launch on mma.sync (sm_80 and newer): LN → fc1 → activation → fc2 → residual.
//
// A block owns 32 · MT rows. Their normalised tile stays in shared memory; the hidden width passes by in chunks of
// 64 whose activations live in shared memory only; fc2's sums stay in registers. Each weight tile has one buffer:
// fc1's next chunk is copied while fc2 multiplies, and the other way round.
#pragma once

#include "epilogue.cuh"
#include "rows.cuh"

namespace prunevit::mlp {

// Copy `bytes` (a multiple of 16) by all threads of the block, as one group.
PRUNEVIT_DEVICE void copy_tile(uint32_t to, const unsigned char* from, int64_t bytes, int thread) {
    for (int at = thread * kPieceBytes; at < bytes; at += kThreads * kPieceBytes) copy_async(to + at, from + at);
}

template <Dtype D, int MT, int NU>
__global__ void __launch_bounds__(kThreads, (MT * NU) <= 6 ? 2 : 1) fused_mma(const __grid_constant__ Arguments a) {
    constexpr int kRows = 32 * MT;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int row0 = blockIdx.x * kRows, warp_row0 = warp_row(warp) * 16 * MT;
    const Range chunks = split_range(a.shape.chunks(), a.splits, blockIdx.y);
    const FusedShared at = fused_shared(kRows, a.shape);
    unsigned char* const shared = shared_memory();
    const uint32_t base = shared_address(shared);
    const auto copy_w1 = [&](int chunk) {
        const int64_t bytes = w1_chunk_bytes(a.shape);
        if (chunk < chunks.end) copy_tile(base + at.w1, a.w1 + chunk * bytes, bytes, thread);
        commit_copies();  // an empty group too: the counts below stay the same in the last chunk
    };
    const auto copy_w2 = [&](int chunk) {
        const int64_t bytes = w2_chunk_bytes(a.shape);
        if (chunk < chunks.end) copy_tile(base + at.w2, a.w2 + chunk * bytes, bytes, thread);
        commit_copies();
    };

    await_launches();
    const RowTile rows{row0, kRows, shared, thread, kThreads};
    fetch_rows(a, rows);
    copy_w1(chunks.begin);
    copy_w2(chunks.begin);
    normalise_rows<D, 2, kFusedWidestEmbed / kPanel>(a, rows);

    float sums[MT][2 * NU][4] = {};
    for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
        const int units = a.shape.chunk_units(chunk);
        float hidden[MT][2][4] = {};
        wait_copies<1>();  // fc1's chunk is here, fc2's may still come
        __syncthreads();
        multiply<D, MT, 1>(hidden, {base, kRows}, warp_row0, {base + at.w1, kChunk}, warp_column(warp), 1, units,
                           a.shape.in_steps(), lane);
        __syncthreads();
        copy_w1(chunk + 1);

        if (warp_column(warp) < units) {
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                float v[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int column = warp_column(warp) * kUnit + i / 4 * 8 + c_place(lane, i % 4).column;
                    v[i] = hidden[m][i / 4][i % 4] + a.b1[chunk * kChunk + column];
                }
                activate(v, a.act);
#pragma unroll
                for (int i = 0; i < 8; i += 2) {
                    const Place place = c_place(lane, i % 4);
                    const int row = warp_row0 + m * 16 + place.row;
                    const int column = warp_column(warp) * kUnit + i / 4 * 8 + place.column;
                    *reinterpret_cast<uint32_t*>(shared + at.hidden + element_offset(kRows, row, column)) =
                        narrow<D>(v[i], v[i + 1]);
                }
            }
        }
        wait_copies<1>();  // fc2's chunk is here, fc1's next may still come
        __syncthreads();
        multiply<D, MT, NU>(sums, {base + at.hidden, kRows}, warp_row0, {base + at.w2, a.shape.out_padded()},
                            warp_column(warp), kWarpsAlongColumns, a.shape.out_units(), units, lane);
        __syncthreads();
        copy_w2(chunk + 1);
    }
    wait_copies<0>();
    __syncthreads();

    // a split keeps its sums in device memory; reduce_splits adds them up, in order
    float* const stage = reinterpret_cast<float*>(shared);
    const int columns = a.shape.out_padded();
#pragma unroll
    for (int u = 0; u < NU; ++u) {
        const int unit = warp_column(warp) + u * kWarpsAlongColumns;
        if (unit >= a.shape.out_units()) break;
#pragma unroll
        for (int i = 0; i < MT * 4; ++i) {
            const int m = i / 4, half = i % 4 / 2, pair = i % 2 * 2;
            const Place place = c_place(lane, pair);
            const int row = warp_row0 + m * 16 + place.row, column = unit * kUnit + half * 8 + place.column;
            float* to = stage + row * stage_pitch(columns) + column;
            if (a.splits > 1) {
                if (row0 + row >= a.shape.rows) continue;
                to = a.partial + (int64_t{blockIdx.y} * a.shape.rows + row0 + row) * columns + column;
            }
            to[0] = sums[m][2 * u + half][pair];
            to[1] = sums[m][2 * u + half][pair + 1];
        }
    }
    if (a.splits > 1) return;
    __syncthreads();
    add_staged<D>(a, stage, row0, kRows, 0, columns, thread, kThreads);
}

// x += γ (Σ splits + b2). A launch of its own: every split must have ended, and the whole chip shares the reading.
template <Dtype D>
__global__ void __launch_bounds__(kThreads) reduce_splits(const __grid_constant__ Arguments a) {
    await_launches();
    const int pieces = a.shape.out_padded() / 8;
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int row = static_cast<int>(i / pieces), n = static_cast<int>(i % pieces) * 8;
    if (row >= a.shape.rows) return;
    float v[8] = {};
    for (int split = 0; split < a.splits; ++split) {
        float part[8];
        load_eight(a.partial + (int64_t{split} * a.shape.rows + row) * a.shape.out_padded() + n, part);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] += part[j];
    }
    add_residual<D>(a, row, n, load_piece(a, row, n, a.writes, a.shape.out), v);
}

}  // namespace prunevit::mlp
