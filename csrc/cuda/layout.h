// Where every element lies: packed weights, shared tiles, fragments. Plain constexpr arithmetic for host and device.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define PRUNEVIT_BOTH __host__ __device__
#else
#define PRUNEVIT_BOTH
#endif

namespace prunevit::mlp {

PRUNEVIT_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
PRUNEVIT_BOTH constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// The tensor core multiplies 16 × 16 by 16 × 8: K and F count in units of 16, and so does N, two n-tiles at a time.
constexpr int kUnit = 16;
// Tiles are cut into panels of 64 columns, 128 bytes a row: one swizzle span of ldmatrix and of wgmma alike.
constexpr int kPanel = 64;
constexpr int kRowBytes = 2 * kPanel;
constexpr int kPieceBytes = 16;                   // one asynchronous copy, one ldmatrix row
constexpr int kPieces = kRowBytes / kPieceBytes;  // pieces of a panel row
constexpr int kPieceColumns = kPieceBytes / 2;

// One chunk of the hidden width is one panel of fc2's K.
constexpr int kChunk = kPanel;

// Byte offset of a piece inside a panel. The exclusive-or puts the eight rows that ldmatrix or a tensor core reads
// together into eight different bank groups; it is the hardware's 128-byte swizzle.
PRUNEVIT_BOTH constexpr int piece_offset(int row, int piece) {
    return row * kRowBytes + ((piece ^ (row & 7)) * kPieceBytes);
}

// Byte offset of an element in a tile of `rows` rows: panels one after another.
PRUNEVIT_BOTH constexpr int element_offset(int rows, int row, int column) {
    return column / kPanel * rows * kRowBytes + piece_offset(row, column % kPanel / kPieceColumns) +
           column % kPieceColumns * 2;
}

// M, E, K (channels that fc1 reads), F, N (channels that fc2 writes).
struct Shape {
    int rows, embed, in, hidden, out;

    PRUNEVIT_BOTH constexpr int in_steps() const { return ceil_div(in, kUnit); }
    PRUNEVIT_BOTH constexpr int in_panels() const { return ceil_div(in, kPanel); }
    PRUNEVIT_BOTH constexpr int hidden_padded() const { return round_up(hidden, kUnit); }
    PRUNEVIT_BOTH constexpr int chunks() const { return ceil_div(hidden, kChunk); }
    PRUNEVIT_BOTH constexpr int out_units() const { return ceil_div(out, kUnit); }
    PRUNEVIT_BOTH constexpr int out_padded() const { return round_up(out, kUnit); }
    // Units of 16 hidden columns that chunk c really has.
    PRUNEVIT_BOTH constexpr int chunk_units(int c) const {
        const int left = (hidden_padded() - c * kChunk) / kUnit;
        return left < kChunk / kUnit ? left : kChunk / kUnit;
    }
};

// Packed weights are images of shared memory, swizzled already, so that a copy is linear whoever makes it.
// fc1: [chunk][panel of K][64 hidden rows][64 columns of K]; fc2: [chunk][out_padded rows][64 hidden columns].
PRUNEVIT_BOTH constexpr int64_t w1_panel_bytes() { return int64_t{kChunk} * kRowBytes; }
PRUNEVIT_BOTH constexpr int64_t w1_chunk_bytes(const Shape& s) { return s.in_panels() * w1_panel_bytes(); }
PRUNEVIT_BOTH constexpr int64_t w2_chunk_bytes(const Shape& s) { return int64_t{s.out_padded()} * kRowBytes; }

PRUNEVIT_BOTH constexpr int64_t w1_element(const Shape& s, int hidden, int in) {
    return hidden / kChunk * w1_chunk_bytes(s) + element_offset(kChunk, hidden % kChunk, in);
}
PRUNEVIT_BOTH constexpr int64_t w2_element(const Shape& s, int out, int hidden) {
    return hidden / kChunk * w2_chunk_bytes(s) + element_offset(s.out_padded(), out, hidden % kChunk);
}

// Fragments of mma.m16n8k16, by lane. The same maps serve each warp of a wgmma m64.
struct Place {
    int row, column;
};
// Two neighbouring 16-bit values, register i of 4, of A.
PRUNEVIT_BOTH constexpr Place a_place(int lane, int i) { return {lane / 4 + i % 2 * 8, lane % 4 * 2 + i / 2 * 8}; }
// Two values next to each other in K, register i of 2, of B: row is n, column is k.
PRUNEVIT_BOTH constexpr Place b_place(int lane, int i) { return {lane / 4, lane % 4 * 2 + i * 8}; }
// fp32 value i of 4 of the accumulator.
PRUNEVIT_BOTH constexpr Place c_place(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

// The row and the piece that a lane names to ldmatrix.x4, within a 16 × 16 block whose rows are contiguous in K.
PRUNEVIT_BOTH constexpr Place a_address(int lane) { return {lane % 16, lane / 16}; }
PRUNEVIT_BOTH constexpr Place b_address(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2}; }

// A block of mma.sync kernels: eight warps, two along the rows and four along the columns.
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpsAlongColumns = 4;
PRUNEVIT_BOTH constexpr int warp_row(int warp) { return warp / kWarpsAlongColumns; }
PRUNEVIT_BOTH constexpr int warp_column(int warp) { return warp % kWarpsAlongColumns; }

// fp32 rows of a staged epilogue. Columns come in 16s: with eight extra words, four rows of a quad's pairs lie in
// different banks.
PRUNEVIT_BOTH constexpr int stage_pitch(int columns) { return columns + 8; }

// Chunks of split `index` of `splits`: as even as whole chunks allow, none empty while splits <= chunks.
struct Range {
    int begin, end;
};
PRUNEVIT_BOTH constexpr Range split_range(int chunks, int splits, int index) {
    return {static_cast<int>(int64_t{chunks} * index / splits),
            static_cast<int>(int64_t{chunks} * (index + 1) / splits)};
}

// The one-launch kernels hold rows of x whole: a thread that normalises one has a piece of each of its panels.
constexpr int kFusedWidestEmbed = 512;

// Shared memory of the one-launch kernel on mma.sync. Offsets are multiples of 128.
struct FusedShared {
    int x, w1, w2, hidden, bytes;
};
PRUNEVIT_BOTH constexpr FusedShared fused_shared(int tile_rows, const Shape& s) {
    FusedShared at{};
    at.w1 = tile_rows * s.in_panels() * kRowBytes;
    at.w2 = at.w1 + static_cast<int>(w1_chunk_bytes(s));
    at.hidden = at.w2 + static_cast<int>(w2_chunk_bytes(s));
    const int loop = at.hidden + tile_rows * kRowBytes;
    const int stage = tile_rows * stage_pitch(s.out_padded()) * 4;
    at.bytes = loop > stage ? loop : stage;
    return at;
}

// Shared memory of each of the two GEMMs: a ring of (A, B) panels, then the statistics of the tile's rows.
constexpr int kGemmColumns = 128;
constexpr int kGemmStages = 3;
PRUNEVIT_BOTH constexpr int gemm_stage_bytes(int tile_rows) { return (tile_rows + kGemmColumns) * kRowBytes; }
PRUNEVIT_BOTH constexpr int gemm_shared_bytes(int tile_rows) {
    const int ring = kGemmStages * gemm_stage_bytes(tile_rows);
    const int stage = tile_rows * stage_pitch(kGemmColumns) * 4;
    return (ring > stage ? ring : stage) + tile_rows * 2 * 4;
}

// The one-launch kernel on wgmma: a warpgroup that feeds and two of 64 rows that multiply.
constexpr int kWgmmaThreads = 3 * 128;
constexpr int kTileRows = 128;  // of every tile of wgmma's
PRUNEVIT_BOTH constexpr int row_tiles(const Shape& s) { return ceil_div(s.rows, kTileRows); }
constexpr int kWgmmaColumns[] = {160, 192, 320, 352, 384};  // N as instantiated; above 256 in two halves
constexpr int kWgmmaMostSlots = 8;

// A wgmma descriptor of a K-major tile with 128-byte swizzled rows: eight rows are 1024 bytes, which are aligned so.
// A step along K only adds its bytes to the address: the swizzle applies to the sum.
PRUNEVIT_BOTH constexpr uint64_t tile_descriptor(uint32_t address) {
    constexpr uint64_t kRowsStride = 8 * kRowBytes / 16, kSwizzle128 = 1;
    return (address & 0x3ffff) / 16 | uint64_t{1} << 16 | kRowsStride << 32 | kSwizzle128 << 62;
}
// What moving a tile by so many bytes, a multiple of 16, adds to its descriptor.
PRUNEVIT_BOTH constexpr int descriptor_step(int bytes) { return bytes / 16; }

struct WgmmaShared {
    int ring, slot_bytes, slots, barriers, bytes;
};
// Two normalised tiles, then the ring and its barriers.
PRUNEVIT_BOTH constexpr WgmmaShared wgmma_shared(int columns, const Shape& s, int slots) {
    WgmmaShared at{};
    at.ring = kTileRows * s.in_panels() * kRowBytes;
    const int w1 = static_cast<int>(w1_chunk_bytes(s)), w2 = columns * kRowBytes;  // rows past N are there, unread
    at.slot_bytes = w1 > w2 ? w1 : w2;
    at.slots = slots;
    at.barriers = at.ring + slots * at.slot_bytes;
    at.bytes = at.barriers + slots * 16;
    return at;
}

// The two GEMMs on wgmma. Both multiply blocks of 64 rows, two of them a warpgroup, by panels of weights.
constexpr int kExpandMostChunks = 2;  // hidden columns of a tile, in chunks
constexpr int kExpandMaxEmbed = 768;  // 128 rows of it leave two tiles of weights beside them
constexpr int kExpandMostSlots = 8;
constexpr int kExpandSlotBytes = kExpandMostChunks * kChunk * kRowBytes;
constexpr int kContractRows = 256, kContractSlots = 4;
constexpr int kContractColumns[] = {64, 128, 160, 176, 192};  // of a tile, as instantiated

// Between them, hidden activations are images of shared memory too: [row tile of 128][chunk][128 rows][64 columns].
constexpr int kHiddenTileBytes = kTileRows * kRowBytes;
PRUNEVIT_BOTH constexpr int64_t hidden_tile(const Shape& s, int row_tile, int chunk) {
    return (int64_t{row_tile} * s.chunks() + chunk) * kHiddenTileBytes;
}

// Where a thread's eight activations lie in a tile, once the four lanes of a quad have exchanged theirs: of a group of
// 32 columns, a block of 64 rows and a half of 16 rows. The lane decides the first term, the loop the others.
PRUNEVIT_BOTH constexpr int hidden_lane_offset(int warp, int lane) {
    return piece_offset(warp * 16 + lane / 4, lane % 4);
}
PRUNEVIT_BOTH constexpr int hidden_piece_offset(int lane_offset, int group, int block, int half) {
    const int in_panel = (lane_offset ^ group % 2 * 4 * kPieceBytes) + (block * 64 + half * 8) * kRowBytes;
    return in_panel + group / 2 * kHiddenTileBytes;
}

// The tiles of one block's share of the hidden width, in the order in which its warpgroups take turns at them.
struct HiddenTiles {
    int chunks, each, block, blocks;  // all chunks; those of a tile; which of how many blocks

    PRUNEVIT_BOTH constexpr int count() const { return ceil_div(ceil_div(chunks, each) - block, blocks); }
    PRUNEVIT_BOTH constexpr int first(int tile) const { return (block + tile * blocks) * each; }
    PRUNEVIT_BOTH constexpr int width(int tile) const {
        const int left = chunks - first(tile);
        return left < each ? left : each;
    }
};

struct ExpandShared {
    int ring, barriers, turns, bytes;
};
// The normalised rows, then the ring, then its barriers and those by which the warpgroups take turns.
PRUNEVIT_BOTH constexpr ExpandShared expand_shared(const Shape& s, int slots) {
    ExpandShared at{};
    at.ring = kTileRows * s.in_panels() * kRowBytes;
    at.barriers = at.ring + slots * kExpandSlotBytes;
    at.turns = at.barriers + slots * 16;
    at.bytes = at.turns + 2 * 8;
    return at;
}

PRUNEVIT_BOTH constexpr int contract_slot_bytes(int columns) { return (kContractRows + columns) * kRowBytes; }
PRUNEVIT_BOTH constexpr int contract_barriers(int columns) { return kContractSlots * contract_slot_bytes(columns); }
PRUNEVIT_BOTH constexpr int contract_shared_bytes(int columns) {
    return contract_barriers(columns) + kContractSlots * 16;
}

}  // namespace prunevit::mlp
