// The whole MLP in one launch on sm_90a: as fused_mma.cuh, with wgmma for the products and bulk copies for weights.
//
// A block owns 128 rows. One thread of the first warpgroup feeds a ring of weight tiles: fc1's chunk, fc2's chunk,
// and so on. Each of the two others owns 64 rows and keeps everything of them to itself: the normalised tile, the
// activations (which go from one product's accumulators straight into the next one's registers), fc2's sums. They run
// apart as far as the ring allows, so that one's activations overlap the other's products.
#pragma once

#include "rows.cuh"
#include "ring.cuh"
#include "wgmma.cuh"

namespace prunevit::mlp {

PRUNEVIT_DEVICE void feed(const Arguments& a, const Ring& ring) {
    const int w1_bytes = static_cast<int>(w1_chunk_bytes(a.shape)), w2_bytes = static_cast<int>(w2_chunk_bytes(a.shape));
    for (int i = 0; i < 2 * a.shape.chunks(); ++i) {
        const bool first = i % 2 == 0;
        const int bytes = first ? w1_bytes : w2_bytes;
        if (i >= ring.count) barrier_wait(ring.empty(i), ring.parity(i) ^ 1);
        barrier_arrive_expecting(ring.full(i), bytes);
        copy_bulk(ring.slot(i), (first ? a.w1 : a.w2) + int64_t{i / 2} * bytes, bytes, ring.full(i));
    }
}

// hidden += x tile · rows of W1ᵀ. The two tiles have panels of the same size, hence the same steps.
template <Dtype D, int Count>
PRUNEVIT_DEVICE void start_fc1(float (&hidden)[Count], uint32_t x_tile, uint32_t weights, int steps) {
    const uint64_t rows = tile_descriptor(x_tile), columns = tile_descriptor(weights);
    products_begin();
    for (int k = 0; k < steps; ++k) {
        const int step = descriptor_step(k / 4 * kChunk * kRowBytes + k % 4 * kUnit * 2);
        multiply_shared<D, 2 * Count>(hidden, rows + step, columns + step, true);
    }
    products_commit();
}

// Sixteen hidden columns at a time: two n-tiles of fc1's accumulators are one k-step of fc2's A.
template <Dtype D, int Count>
PRUNEVIT_DEVICE void activate_hidden(float (&hidden)[Count], uint32_t (&fragments)[Count / 8][4], Act act) {
#pragma unroll
    for (int k = 0; k < Count / 8; ++k) {
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = hidden[k * 8 + i];
        activate(v, act);
#pragma unroll
        for (int i = 0; i < 4; ++i) fragments[k][i] = narrow<D>(v[2 * i], v[2 * i + 1]);
    }
}

// sums += activations · columns of W2ᵀ, as many of the steps of 16 as are live.
template <Dtype D, int Parts, int Half, int Steps>
PRUNEVIT_DEVICE void start_fc2(float (&sums)[Parts][Half], const uint32_t (&fragments)[Steps][4], uint32_t weights,
                               int live) {
    const uint64_t columns = tile_descriptor(weights);
    const auto step = [&](int k) {
#pragma unroll
        for (int part = 0; part < Parts; ++part) {
            const int along = descriptor_step(part * 2 * Half * kRowBytes + k * kUnit * 2);
            multiply_wide<D, 2 * Half>(sums[part], fragments[k], columns + along);
        }
    };
    products_begin();
    if (live >= Steps) {  // straight through: branches between products would serialise them
#pragma unroll
        for (int k = 0; k < Steps; ++k) step(k);
    } else {
#pragma unroll
        for (int k = 0; k + 1 < Steps; ++k) {
            if (k < live) step(k);
        }
    }
    products_commit();
}

// All chunks of one warpgroup, fc1 of the next chunk on its way before fc2 of this one has ended.
template <Dtype D, int Parts, int Half>
PRUNEVIT_DEVICE void multiply_ahead(float (&sums)[Parts][Half], const Arguments& a, const Ring& ring, uint32_t x_tile,
                                    int lane) {
    const int steps = a.shape.in_steps(), chunks = a.shape.chunks();
    float hidden[kChunk / 2];
    uint32_t fragments[kChunk / kUnit][4];
    begin_with(hidden, a.b1, lane);
    pin(hidden);
    barrier_wait(ring.full(0), ring.parity(0));
    start_fc1<D>(hidden, x_tile, ring.slot(0), steps);
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int fc1 = 2 * chunk, fc2 = fc1 + 1;
        products_wait<0>();
        pin(hidden);
        if (lane == 0) barrier_arrive(ring.empty(fc1));
        activate_hidden<D>(hidden, fragments, a.act);
        if (chunk + 1 < chunks) begin_with(hidden, a.b1 + (chunk + 1) * kChunk, lane);
        pin(hidden);
        barrier_wait(ring.full(fc2), ring.parity(fc2));
        start_fc2<D>(sums, fragments, ring.slot(fc2), a.shape.chunk_units(chunk));
        if (chunk + 1 < chunks) {
            barrier_wait(ring.full(fc2 + 1), ring.parity(fc2 + 1));
            start_fc1<D>(hidden, x_tile, ring.slot(fc2 + 1), steps);
            products_wait<1>();  // fc2 has ended: its weights may go while fc1 runs on
        } else {
            products_wait<0>();
        }
        if (lane == 0) barrier_arrive(ring.empty(fc2));
    }
    products_wait<0>();
}

// The same in turn and in halves of a chunk, where fc2's sums leave no registers for more: the other warpgroup's
// products fill the gaps.
template <Dtype D, int Parts, int Half>
PRUNEVIT_DEVICE void multiply_in_turn(float (&sums)[Parts][Half], const Arguments& a, const Ring& ring,
                                      uint32_t x_tile, int lane) {
    constexpr int kColumns = kChunk / 2, kSteps = kColumns / kUnit;
    const int steps = a.shape.in_steps(), chunks = a.shape.chunks();
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int fc1 = 2 * chunk, fc2 = fc1 + 1, units = a.shape.chunk_units(chunk);
        barrier_wait(ring.full(fc1), ring.parity(fc1));
        for (int half = 0; half < 2 && half * kSteps < units; ++half) {
            float hidden[kColumns / 2];
            uint32_t fragments[kSteps][4];
            begin_with(hidden, a.b1 + chunk * kChunk + half * kColumns, lane);
            pin(hidden);
            start_fc1<D>(hidden, x_tile, ring.slot(fc1) + half * kColumns * kRowBytes, steps);
            products_wait<0>();
            pin(hidden);
            activate_hidden<D>(hidden, fragments, a.act);
            if (half == 0) barrier_wait(ring.full(fc2), ring.parity(fc2));
            start_fc2<D>(sums, fragments, ring.slot(fc2) + half * kColumns * 2, units - half * kSteps);
            products_wait<0>();
        }
        if (lane == 0) {
            barrier_arrive(ring.empty(fc1));
            barrier_arrive(ring.empty(fc2));
        }
    }
}

template <Dtype D, int Columns>
__global__ void __launch_bounds__(kWgmmaThreads, 1) fused_wgmma(const __grid_constant__ Arguments a) {
    constexpr int kParts = Columns > 256 ? 2 : 1, kWidth = Columns / kParts;
    const int thread = threadIdx.x, lane = thread % 32;
    const int group = thread / 128 - 1;  // −1 feeds, 0 and 1 multiply
    const int row0 = blockIdx.x * kWgmmaRows;
    const WgmmaShared at = wgmma_shared(Columns, a.shape, a.slots);
    unsigned char* const shared = shared_memory();
    const uint32_t base = shared_address(shared);
    const Ring ring{base + at.ring, base + at.barriers, at.slot_bytes, at.slots};

    if (thread == 0) {
        for (int i = 0; i < ring.count; ++i) {
            barrier_init(ring.full(i), 1);
            barrier_init(ring.empty(i), 8);  // one arrival a multiplying warp
        }
        barriers_ready();
    }
    __syncthreads();

    if (group < 0) {
        give_registers<24>();
        if (thread == 0) feed(a, ring);
    } else {
        take_registers<240>();
        const int own = group * 64 * a.shape.in_panels() * kRowBytes;
        const RowTile rows{row0 + group * 64, 64, shared + own, thread % 128, 128};
        fetch_rows(a, rows);
        normalise_rows<D, 0>(a, rows);
        publish_to_async();
        meet(1 + group, 128);

        float sums[kParts][kWidth / 2] = {};
        if constexpr (Columns <= 320) {
            multiply_ahead<D>(sums, a, ring, base + own, lane);
        } else {
            multiply_in_turn<D>(sums, a, ring, base + own, lane);
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) pin(sums[part]);

        meet(3, 256);  // both have read their last tile: its memory becomes the epilogue's
        constexpr int kPitch = stage_pitch(Columns);
        float* const stage = reinterpret_cast<float*>(shared);
        const Place first = c_place(lane, 0);
        const int columns = a.shape.out_padded(), row = group * 64 + thread % 128 / 32 * 16 + first.row;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            const int column = part * kWidth;
            store_sums(sums[part], stage + row * kPitch + column + first.column, kPitch, columns - column, 16);
        }
        meet(3, 256);
        add_staged<D>(a, stage, row0, kWgmmaRows, 0, Columns, thread - 128, 256);
    }
}

}  // namespace prunevit::mlp
