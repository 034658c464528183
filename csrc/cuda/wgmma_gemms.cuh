// The MLP in two launches on sm_90a, for widths that one block cannot hold: two_gemms.cuh with wgmma and bulk copies.
//
// wgmma_expand: hidden = act(LN(x) W1ᵀ + b1). A block owns 128 rows, normalised once into shared memory, and a share of
// the hidden columns. Two warpgroups take turns, a tile of 128 rows × 128 columns each: while one multiplies, the other
// activates its sums and stores them.
// wgmma_contract: x += γ (hidden W2ᵀ + b2), or fp32 sums of a split of the hidden width. A block owns 256 rows, 128 a
// warpgroup, and up to 192 columns.
// In both, one thread feeds a ring by bulk copies. Weights and hidden activations lie in memory as images of shared
// memory, so every copy is linear and needs no tensor map.
#pragma once

#include "epilogue.cuh"
#include "ring.cuh"
#include "rows.cuh"
#include "wgmma.cuh"

namespace prunevit::mlp {

// sums += 128 rows of A · rows of Bᵀ, over one panel or its first steps of 16, as one group of products.
template <Dtype D, int Half>
PRUNEVIT_DEVICE void start_panel(float (&sums)[2][Half], uint32_t a, uint32_t b, int steps) {
    const uint64_t rows = tile_descriptor(a), columns = tile_descriptor(b);
    with_constant<kPanel / kUnit>(steps, [&](auto count) {
        products_begin();
#pragma unroll
        for (int k = 0; k < count.value; ++k) {
            const int along = descriptor_step(k * kUnit * 2);
#pragma unroll
            for (int block = 0; block < 2; ++block) {
                multiply_shared<D, 2 * Half>(sums[block], rows + descriptor_step(block * 64 * kRowBytes) + along,
                                             columns + along);
            }
        }
        products_commit();
    });
}

PRUNEVIT_DEVICE void feed_expand(const Arguments& a, const Ring& ring, const HiddenTiles& tiles) {
    const int panels = a.shape.in_panels(), bytes = static_cast<int>(w1_panel_bytes());
    Turn turn;
    for (int tile = 0; tile < tiles.count(); ++tile) {
        for (int panel = 0; panel < panels; ++panel, turn = ring.after(turn)) {
            ring.wait_empty(turn);
            barrier_arrive_expecting(ring.full(turn), tiles.width(tile) * bytes);
            for (int chunk = 0; chunk < tiles.width(tile); ++chunk) {
                const int64_t from = (tiles.first(tile) + chunk) * w1_chunk_bytes(a.shape) + int64_t{panel} * bytes;
                copy_bulk(ring.slot(turn) + chunk * bytes, a.w1 + from, bytes, ring.full(turn));
            }
        }
    }
}

// Activations of a tile into the images that wgmma_contract copies, 32 columns at a time: sixteen bytes a lane, and
// with them whole sectors. Rows past M and columns past F are written as well, since they are copied.
template <Dtype D, int Half>
PRUNEVIT_DEVICE void store_hidden(const Arguments& a, const float (&sums)[2][Half], int chunk0, int warp, int lane) {
    auto* const tile = reinterpret_cast<unsigned char*>(a.hidden) + hidden_tile(a.shape, blockIdx.x, chunk0);
    uint32_t lane_offset = hidden_lane_offset(warp, lane);
    forget(lane_offset);  // else all sums of it stay in registers from tile to tile
#pragma unroll
    for (int group = 0; group < Half / 16; ++group) {
#pragma unroll
        for (int block = 0; block < 2; ++block) {
            float v[16];
#pragma unroll
            for (int i = 0; i < 16; ++i) v[i] = sums[block][group * 16 + i];
            activate(v, a.act);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Piece piece;
#pragma unroll
                for (int j = 0; j < 4; ++j) piece.pair[j] = narrow<D>(v[4 * j + 2 * half], v[4 * j + 2 * half + 1]);
                exchange_in_quad(piece.pair, lane);
                *reinterpret_cast<Piece*>(tile + hidden_piece_offset(lane_offset, group, block, half)) = piece;
            }
        }
    }
}

// The block's tile `tile`, Chunks chunks wide, by one warpgroup; its weights begin at the ring's turn.
template <Dtype D, int Chunks>
PRUNEVIT_DEVICE void expand_tile(const Arguments& a, const Ring& ring, Turn turn, const HiddenTiles& tiles, int tile,
                                 uint32_t x_tile, uint32_t turns, int thread) {
    float sums[2][Chunks * kChunk / 2];
    const int panels = a.shape.in_panels(), lane = thread % 32, own = tile % 2;
    Turn before;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
        begin_with(sums[block], a.b1 + tiles.first(tile) * kChunk, lane);
        pin(sums[block]);
    }
    // The ring holds tiles in their order: only when the other warpgroup has seen all of the tile before is every slot
    // in the phase that is waited for here.
    if (tile > 0) barrier_wait(turns + (own ^ 1) * 8, (tile - 1) / 2 % 2);
    for (int panel = 0; panel < panels; ++panel) {
        const int left = a.shape.in_steps() - panel * (kPanel / kUnit);
        ring.wait_full(turn);
        start_panel<D>(sums, x_tile + panel * kTileRows * kRowBytes, ring.slot(turn), left);
        if (panel > 0) {
            products_wait<1>();  // the panel before has been multiplied: its weights may go
            ring.release(before, lane);
        }
        before = turn;
        turn = ring.after(turn);
    }
    if (lane == 0) barrier_arrive(turns + own * 8);
    products_wait<0>();
    pin(sums[0]);
    pin(sums[1]);
    ring.release(before, lane);
    store_hidden<D>(a, sums, tiles.first(tile), thread / 32, lane);
}

template <Dtype D>
__global__ void __launch_bounds__(kWgmmaThreads, 1) wgmma_expand(const __grid_constant__ Arguments a) {
    const int thread = threadIdx.x;
    const int group = uniform(thread / 128) - 1;  // −1 feeds, 0 and 1 multiply
    const HiddenTiles tiles{a.shape.chunks(), a.tile_chunks, static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y)};
    const ExpandShared at = expand_shared(a.shape, a.slots);
    unsigned char* const shared = shared_memory();
    const uint32_t base = shared_address(shared), turns = base + at.turns;
    const Ring ring{base + at.ring, base + at.barriers, kExpandSlotBytes, a.slots};

    if (thread == 0) {
        for (int i = 0; i < ring.count; ++i) {
            barrier_init(ring.full({i}), 1);
            barrier_init(ring.empty({i}), 4);  // one arrival a warp of the one warpgroup that multiplies
        }
        for (int i = 0; i < 2; ++i) barrier_init(turns + i * 8, 4);
        barriers_ready();
    }
    __syncthreads();

    if (group < 0) {
        give_registers<40>();
        if (thread == 0) feed_expand(a, ring, tiles);
    } else {
        take_registers<232>();
        await_launches();  // the ring fills meanwhile: no launch writes weights
        const RowTile rows{static_cast<int>(blockIdx.x) * kTileRows, kTileRows, shared, thread - 128, 256};
        fetch_rows(a, rows);
        normalise_rows<D, 0, kExpandMaxEmbed / kPanel>(a, rows);
        publish_to_async();
        meet(1, 256);
        Turn turn = ring.after({}, group * a.shape.in_panels());
        for (int tile = group; tile < tiles.count(); tile += 2, turn = ring.after(turn, 2 * a.shape.in_panels())) {
            if (tiles.width(tile) == 2) {
                expand_tile<D, 2>(a, ring, turn, tiles, tile, base, turns, thread % 128);
            } else {
                expand_tile<D, 1>(a, ring, turn, tiles, tile, base, turns, thread % 128);
            }
        }
    }
}

// A block's part of x += γ (hidden W2ᵀ + b2): which row tiles of 128, columns and chunks.
struct ContractPart {
    int row_tile, live, column0, columns;  // `live` warpgroups have rows
    Range chunks;

    // Blocks of the same rows follow each other: all but the first find the activations in the L2 cache.
    PRUNEVIT_DEVICE ContractPart(const Arguments& a, int most)
        : row_tile(2 * (blockIdx.x / ceil_div(a.shape.out, most))),
          live(row_tiles(a.shape) - row_tile < 2 ? 1 : 2),
          column0(blockIdx.x % ceil_div(a.shape.out, most) * most),
          columns(a.shape.out_padded() - column0 < most ? a.shape.out_padded() - column0 : most),
          chunks(split_range(a.shape.chunks(), a.splits, blockIdx.y)) {}
};

PRUNEVIT_DEVICE void feed_contract(const Arguments& a, const Ring& ring, const ContractPart& part) {
    const auto* const hidden = reinterpret_cast<const unsigned char*>(a.hidden);
    const int bytes = part.columns * kRowBytes;
    Turn turn;
    for (int chunk = part.chunks.begin; chunk < part.chunks.end; ++chunk, turn = ring.after(turn)) {
        ring.wait_empty(turn);
        barrier_arrive_expecting(ring.full(turn), part.live * kHiddenTileBytes + bytes);
        for (int group = 0; group < part.live; ++group) {
            const int64_t from = hidden_tile(a.shape, part.row_tile + group, chunk);
            copy_bulk(ring.slot(turn) + group * kHiddenTileBytes, hidden + from, kHiddenTileBytes, ring.full(turn));
        }
        copy_bulk(ring.slot(turn) + 2 * kHiddenTileBytes,
                  a.w2 + chunk * w2_chunk_bytes(a.shape) + int64_t{part.column0} * kRowBytes, bytes, ring.full(turn));
    }
}

// x is read again only when all has been multiplied: it comes into the L2 cache meanwhile.
PRUNEVIT_DEVICE void prefetch_residual(const Arguments& a, const ContractPart& part, int thread, int threads) {
    const int lines = ceil_div(part.columns, kPanel);
    for (int i = thread; i < kContractRows * lines; i += threads) {
        const int row = part.row_tile * kTileRows + i / lines, column = part.column0 + i % lines * kPanel;
        if (row < a.shape.rows && column < a.shape.embed) prefetch(a.x + row * a.pitch + column);
    }
}

template <Dtype D, int Columns>
__global__ void __launch_bounds__(kWgmmaThreads, 1) wgmma_contract(const __grid_constant__ Arguments a) {
    const int thread = threadIdx.x, lane = thread % 32;
    const int group = uniform(thread / 128) - 1;  // −1 feeds, 0 and 1 multiply
    const ContractPart part(a, Columns);
    unsigned char* const shared = shared_memory();
    const uint32_t base = shared_address(shared);
    const Ring ring{base, base + contract_barriers(Columns), contract_slot_bytes(Columns), kContractSlots};

    if (thread == 0) {
        for (int i = 0; i < ring.count; ++i) {
            barrier_init(ring.full({i}), 1);
            barrier_init(ring.empty({i}), 4 * part.live);
        }
        barriers_ready();
    }
    __syncthreads();
    await_launches();

    if (group < 0) {
        give_registers<40>();
        if (thread == 0) feed_contract(a, ring, part);
        if (thread >= 32 && a.splits == 1 && a.writes == nullptr) prefetch_residual(a, part, thread - 32, 96);
    } else {
        take_registers<232>();
        if (group >= part.live) return;
        float sums[2][Columns / 2] = {};
        pin(sums[0]);
        pin(sums[1]);
        Turn turn, before;
        for (int chunk = part.chunks.begin; chunk < part.chunks.end; ++chunk) {
            ring.wait_full(turn);
            start_panel<D>(sums, ring.slot(turn) + group * kHiddenTileBytes, ring.slot(turn) + 2 * kHiddenTileBytes,
                           a.shape.chunk_units(chunk));
            if (chunk > part.chunks.begin) {
                products_wait<1>();
                ring.release(before, lane);
            }
            before = turn;
            turn = ring.after(turn);
        }
        products_wait<0>();
        pin(sums[0]);
        pin(sums[1]);

        const Place first = c_place(lane, 0);
        const int row = (part.row_tile + group) * kTileRows + thread % 128 / 32 * 16 + first.row;
#pragma unroll
        for (int block = 0; block < 2; ++block) {
            if (a.splits == 1) {
                add_sums<D, (Columns < 192)>(a, sums[block], row + block * 64, part.column0, lane);
            } else {
                const int64_t line = int64_t{blockIdx.y} * a.shape.rows + row + block * 64;
                float* const to = a.partial + line * a.shape.out_padded() + part.column0 + first.column;
                store_sums(sums[block], to, a.shape.out_padded(), part.columns, a.shape.rows - row - block * 64);
            }
        }
    }
}

}  // namespace prunevit::mlp
