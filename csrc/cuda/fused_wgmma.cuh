// The whole MLP in one launch on sm_90a: as fused_mma.cuh, with wgmma for the products and bulk copies for weights.
//
// A block takes tiles of 128 rows, one after another. One thread of the first warpgroup feeds a ring of weight tiles:
// fc1's chunk, fc2's chunk, and so on, for every tile anew. Each of the two others owns 64 rows of a tile and keeps
// everything of them to itself: the normalised rows, the activations (which go from one product's accumulators straight
// into the next one's registers), fc2's sums. They run apart as far as the ring allows, so that one's activations, and
// its rows on their way in and out, overlap the other's products.
#pragma once

#include "epilogue.cuh"
#include "ring.cuh"
#include "rows.cuh"
#include "wgmma.cuh"

namespace prunevit::mlp {

// The rows that follow come into the L2 cache, where they lie close together.
PRUNEVIT_DEVICE void prefetch_rows(const Arguments& a, int row0, int rows) {
    const int left = a.shape.rows - row0, live = left < rows ? left : rows;
    const int bytes = static_cast<int>((live - 1) * a.pitch + a.shape.embed / 8 * 8) * 2;
    if (a.wide && a.pitch <= 2 * a.shape.embed && bytes > 0) prefetch_bulk(a.x + row0 * a.pitch, bytes);
}

// The row tiles of this block.
struct OwnTiles {
    int first, step, end;

    PRUNEVIT_DEVICE explicit OwnTiles(const Arguments& a)
        : first(static_cast<int>(blockIdx.x)), step(static_cast<int>(gridDim.x)), end(row_tiles(a.shape)) {}
    PRUNEVIT_DEVICE bool several() const { return first + step < end; }
};

PRUNEVIT_DEVICE void feed(const Arguments& a, const Ring& ring, const OwnTiles& tiles) {
    const int w1_bytes = static_cast<int>(w1_chunk_bytes(a.shape)),
              w2_bytes = static_cast<int>(w2_chunk_bytes(a.shape));
    Turn turn;
    for (int tile = tiles.first; tile < tiles.end; tile += tiles.step) {
        if (tile + tiles.step < tiles.end) prefetch_rows(a, (tile + tiles.step) * kTileRows, kTileRows);
        for (int weight = 0; weight < 2 * a.shape.chunks(); ++weight, turn = ring.after(turn)) {
            const bool first = weight % 2 == 0;
            const int bytes = first ? w1_bytes : w2_bytes;
            ring.wait_empty(turn);
            barrier_arrive_expecting(ring.full(turn), bytes);
            copy_bulk(ring.slot(turn), (first ? a.w1 : a.w2) + int64_t{weight / 2} * bytes, bytes, ring.full(turn));
        }
    }
}

// hidden += x tile · rows of W1ᵀ. The two tiles have panels of the same size, hence the same steps.
template <Dtype D, int Count>
PRUNEVIT_DEVICE void start_fc1(float (&hidden)[Count], uint32_t x_tile, uint32_t weights, int steps) {
    const uint64_t rows = tile_descriptor(x_tile), columns = tile_descriptor(weights);
    products_begin();
    for (int k = 0; k < steps; ++k) {
        const int step = descriptor_step(k / 4 * kChunk * kRowBytes + k % 4 * kUnit * 2);
        multiply_shared<D, 2 * Count>(hidden, rows + step, columns + step);
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
    // Nearly always all are: straight through, since a branch before the commit would make it a group of its own.
    if (live >= Steps) {
        products_begin();
#pragma unroll
        for (int k = 0; k < Steps; ++k) step(k);
        products_commit();
    } else {
        products_begin();
#pragma unroll
        for (int k = 0; k + 1 < Steps; ++k) {
            if (k < live) step(k);
        }
        products_commit();
    }
}

// All chunks of one warpgroup's rows, fc1 of the next chunk on its way before fc2 of this one has ended. `fc1` is the
// ring's turn of the first weights, and then of those after the last.
template <Dtype D, int Parts, int Half>
PRUNEVIT_DEVICE void multiply_ahead(float (&sums)[Parts][Half], const Arguments& a, const Ring& ring, Turn& fc1,
                                    uint32_t x_tile, int lane) {
    const int steps = a.shape.in_steps(), chunks = a.shape.chunks();
    float hidden[kChunk / 2];
    uint32_t fragments[kChunk / kUnit][4];
    begin_with(hidden, a.b1, lane);
    pin(hidden);
    ring.wait_full(fc1);
    start_fc1<D>(hidden, x_tile, ring.slot(fc1), steps);
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const Turn fc2 = ring.after(fc1);
        products_wait<0>();
        pin(hidden);
        ring.release(fc1, lane);
        fc1 = ring.after(fc2);
        activate_hidden<D>(hidden, fragments, a.act);
        if (chunk + 1 < chunks) begin_with(hidden, a.b1 + (chunk + 1) * kChunk, lane);
        pin(hidden);
        ring.wait_full(fc2);
        start_fc2<D>(sums, fragments, ring.slot(fc2), a.shape.chunk_units(chunk));
        if (chunk + 1 < chunks) {
            ring.wait_full(fc1);
            start_fc1<D>(hidden, x_tile, ring.slot(fc1), steps);
            products_wait<1>();  // fc2 has ended: its weights may go while fc1 runs on
        } else {
            products_wait<0>();
        }
        ring.release(fc2, lane);
    }
    products_wait<0>();
}

// The same in turn, where fc2's sums leave no registers for more: the other warpgroup's products fill the gaps. Width
// hidden columns at a time, a chunk or half of one: products of 64 rows by 32 columns take half as long again as the
// tensor cores need, since they wait for shared memory; 64 by 64 do not.
template <Dtype D, int Width, int Parts, int Half>
PRUNEVIT_DEVICE void multiply_in_turn(float (&sums)[Parts][Half], const Arguments& a, const Ring& ring, Turn& fc1,
                                      uint32_t x_tile, int lane) {
    constexpr int kSteps = Width / kUnit;
    const int steps = a.shape.in_steps(), chunks = a.shape.chunks();
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const Turn fc2 = ring.after(fc1);
        const int units = a.shape.chunk_units(chunk);
        ring.wait_full(fc1);
        for (int done = 0; done < units; done += kSteps) {
            float hidden[Width / 2];
            uint32_t fragments[kSteps][4];
            begin_with(hidden, a.b1 + chunk * kChunk + done * kUnit, lane);
            pin(hidden);
            start_fc1<D>(hidden, x_tile, ring.slot(fc1) + done * kUnit * kRowBytes, steps);
            products_wait<0>();
            pin(hidden);
            if (done + kSteps >= units) ring.release(fc1, lane);  // the next chunk's may come while fc2 runs
            activate_hidden<D>(hidden, fragments, a.act);
            if (done == 0) ring.wait_full(fc2);
            start_fc2<D>(sums, fragments, ring.slot(fc2) + done * kUnit * 2, units - done);
            products_wait<0>();
        }
        ring.release(fc2, lane);
        fc1 = ring.after(fc2);
    }
}

template <Dtype D, int Columns>
__global__ void __launch_bounds__(kWgmmaThreads, 1) fused_wgmma(const __grid_constant__ Arguments a) {
    constexpr int kParts = Columns > 256 ? 2 : 1, kWidth = Columns / kParts;
    const int thread = threadIdx.x, lane = thread % 32;
    const int group = uniform(thread / 128) - 1;  // −1 feeds, 0 and 1 multiply
    const WgmmaShared at = wgmma_shared(Columns, a.shape, a.slots);
    unsigned char* const shared = shared_memory();
    const uint32_t base = shared_address(shared);
    const Ring ring{base + at.ring, base + at.barriers, at.slot_bytes, at.slots};

    if (thread == 0) {
        for (int i = 0; i < ring.count; ++i) {
            barrier_init(ring.full({i}), 1);
            barrier_init(ring.empty({i}), 8);  // one arrival a multiplying warp
        }
        barriers_ready();
    }
    __syncthreads();

    const OwnTiles tiles(a);
    if (group < 0) {
        give_registers<24>();
        if (thread == 0) feed(a, ring, tiles);
    } else {
        take_registers<240>();
        await_launches();  // the ring fills meanwhile: no launch writes weights
        const int own = group * 64 * a.shape.in_panels() * kRowBytes;
        const auto rows_of = [&](int tile) {
            return RowTile{tile * kTileRows + group * 64, 64, shared + own, thread % 128, 128};
        };
        fetch_rows(a, rows_of(tiles.first));
        Turn turn;
        for (int tile = tiles.first; tile < tiles.end; tile += tiles.step) {
            // Once set apart, the warpgroups stay so: one's rows go out and come in while the other multiplies.
            const bool part = tile == tiles.first && tiles.several();
            if (part && group == 1) meet(3, 256);
            normalise_rows<D, 0, kFusedWidestEmbed / kPanel>(a, rows_of(tile));
            publish_to_async();
            meet(1 + group, 128);
            if (part && group == 0) meet(3, 256);

            float sums[kParts][kWidth / 2] = {};
            if constexpr (Columns <= 320) {
                multiply_ahead<D>(sums, a, ring, turn, base + own, lane);
            } else {
                multiply_in_turn<D, Columns <= 352 ? kChunk : kChunk / 2>(sums, a, ring, turn, base + own, lane);
            }
#pragma unroll
            for (int half = 0; half < kParts; ++half) pin(sums[half]);

            meet(1 + group, 128);  // all four warps have multiplied: the rows' memory is free
            if (tile + tiles.step < tiles.end) fetch_rows(a, rows_of(tile + tiles.step));
            const int row = rows_of(tile).row0 + thread % 128 / 32 * 16 + c_place(lane, 0).row;
#pragma unroll
            for (int half = 0; half < kParts; ++half) add_sums<D, true>(a, sums[half], row, half * kWidth, lane);
        }
    }
}

}  // namespace prunevit::mlp
