// Every index function of csrc/cuda/layout.h and every plan of plan.h, exhaustively. Prints what is wrong, one line a
// fault; the exit status says whether there was any.
#include <cstdio>
#include <functional>
#include <map>
#include <set>
#include <vector>

#include "plan.h"

using namespace prunevit::mlp;

namespace {

constexpr Kernel kEvery[] = {Kernel::fused, Kernel::split, Kernel::two_gemms, Kernel::wgmma, Kernel::wgmma_gemms};
int faults = 0;

void expect(bool condition, const char* what, const std::string& where) {
    if (condition) return;
    if (++faults <= 20) std::printf("%s: %s\n", what, where.c_str());
}

void swizzle() {
    std::set<int> offsets;
    for (int row = 0; row < 64; ++row) {
        for (int piece = 0; piece < kPieces; ++piece) offsets.insert(piece_offset(row, piece));
    }
    expect(offsets.size() == 64u * kPieces && *offsets.rbegin() == 64 * kRowBytes - kPieceBytes,
           "a panel's pieces fill it once", "64 rows");
    for (int row0 = 0; row0 < 64; row0 += 8) {
        for (int piece = 0; piece < kPieces; ++piece) {
            std::set<int> banks;
            for (int row = row0; row < row0 + 8; ++row) banks.insert(piece_offset(row, piece) % kRowBytes);
            expect(banks.size() == 8, "ldmatrix reads eight rows from eight bank groups", std::to_string(row0));
            // the hardware's swizzle, on whole addresses
            for (int row = row0; row < row0 + 8; ++row) {
                const int flat = row * kRowBytes + piece * kPieceBytes;
                expect(piece_offset(row, piece) == (flat ^ (flat >> 7 & 7) << 4), "the 128-byte swizzle",
                       std::to_string(flat));
            }
        }
    }
    for (const int rows : {16, 32, 64, 96, 128}) {
        for (const int columns : {64, 128, 192}) {
            std::vector<int> written(rows * columns, 0);
            for (int row = 0; row < rows; ++row) {
                for (int column = 0; column < columns; ++column) ++written[element_offset(rows, row, column) / 2];
            }
            for (const int times : written) expect(times == 1, "a tile's elements fill it once", std::to_string(rows));
        }
    }
}

// The maps as the PTX manual draws them, from groupID = lane >> 2 and threadID_in_group = lane % 4.
void fragments() {
    std::map<std::pair<int, int>, int> a, b, c;
    for (int lane = 0; lane < 32; ++lane) {
        const int group = lane >> 2, inside = lane % 4;
        for (int i = 0; i < 8; ++i) {
            const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
            const int column = i < 4 ? inside * 2 + (i & 1) : inside * 2 + (i & 1) + 8;
            const Place place = a_place(lane, i / 2);
            expect(place.row == row && place.column + i % 2 == column, "A's fragment", std::to_string(lane));
            ++a[{row, column}];
        }
        for (int i = 0; i < 4; ++i) {
            const int k = i < 2 ? inside * 2 + (i & 1) : inside * 2 + (i & 1) + 8;
            const Place place = b_place(lane, i / 2);
            expect(place.row == group && place.column + i % 2 == k, "B's fragment", std::to_string(lane));
            ++b[{place.row, k}];
            const Place sum = c_place(lane, i);
            expect(sum.row == (i < 2 ? group : group + 8) && sum.column == inside * 2 + (i & 1), "C's fragment",
                   std::to_string(lane));
            ++c[{sum.row, sum.column}];
        }
    }
    expect(a.size() == 256 && b.size() == 128 && c.size() == 128, "fragments cover their matrices once", "all lanes");
    // ldmatrix.x4: matrix m of lane 8m … 8m + 7 becomes register m of every lane, row lane / 4, columns 2 (lane % 4)
    for (int lane = 0; lane < 32; ++lane) {
        for (int m = 0; m < 4; ++m) {
            const Place from_a = a_address(m * 8 + lane / 4), from_b = b_address(m * 8 + lane / 4);
            const Place to_a = a_place(lane, m), to_b = b_place(lane, m % 2);
            expect(from_a.row == to_a.row && from_a.column * 8 + lane % 4 * 2 == to_a.column, "ldmatrix of A",
                   std::to_string(lane));
            expect(from_b.row == to_b.row + m / 2 * 8 && from_b.column * 8 + lane % 4 * 2 == to_b.column,
                   "ldmatrix of B", std::to_string(lane));
        }
    }
}

// Two neighbouring accumulators of fc1 are one register of fc2's A: what fused_wgmma passes on without a shuffle.
void handover() {
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const int value = 2 * i, half = value / 4;  // v[2i], v[2i + 1] of the 16 hidden columns
            const Place from = c_place(lane, value % 4), to = a_place(lane, i);
            expect(from.row == to.row && half * 8 + from.column == to.column, "fc1's sums as fc2's A",
                   std::to_string(lane));
        }
    }
}

void weights() {
    for (const auto& [in, hidden, out] :
         std::vector<std::tuple<int, int, int>>{{153, 383, 153}, {1, 1, 1}, {64, 64, 16}, {345, 307, 101}}) {
        const Shape s{1, 512, in, hidden, out};
        std::set<int64_t> w1, w2;
        for (int f = 0; f < hidden; ++f) {
            for (int k = 0; k < in; ++k) w1.insert(w1_element(s, f, k));
            for (int n = 0; n < out; ++n) w2.insert(w2_element(s, n, f));
        }
        expect(w1.size() == static_cast<size_t>(in) * hidden && *w1.rbegin() < s.chunks() * w1_chunk_bytes(s),
               "fc1's weights lie apart", describe(s));
        expect(w2.size() == static_cast<size_t>(out) * hidden && *w2.rbegin() < s.chunks() * w2_chunk_bytes(s),
               "fc2's weights lie apart", describe(s));
    }
}

// Every output element belongs to one thread of one block, and every hidden column to one split.
void tiles() {
    for (const FusedShape& shape : kFusedShapes) {
        std::map<std::pair<int, int>, int> owners;
        for (int warp = 0; warp < kWarps; ++warp) {
            for (int lane = 0; lane < 32; ++lane) {
                for (int u = 0; u < shape.nu; ++u) {
                    for (int i = 0; i < shape.mt * 8; ++i) {
                        const Place place = c_place(lane, i % 4);
                        ++owners[{warp_row(warp) * 16 * shape.mt + i / 8 * 16 + place.row,
                                  (warp_column(warp) + u * kWarpsAlongColumns) * kUnit + i % 8 / 4 * 8 + place.column}];
                    }
                }
            }
        }
        const size_t all = 32u * shape.mt * shape.nu * kWarpsAlongColumns * kUnit;
        expect(owners.size() == all && owners.rbegin()->first == std::make_pair(32 * shape.mt - 1, shape.nu * 64 - 1),
               "a tile's outputs have one owner each", std::to_string(shape.mt) + "," + std::to_string(shape.nu));
    }
    for (int chunks = 1; chunks <= 60; ++chunks) {
        for (int splits = 1; splits <= chunks; ++splits) {
            int next = 0;
            for (int i = 0; i < splits; ++i) {
                const Range range = split_range(chunks, splits, i);
                expect(range.begin == next && range.end > range.begin, "splits follow one another, none empty",
                       std::to_string(chunks));
                next = range.end;
            }
            expect(next == chunks, "splits cover the hidden width", std::to_string(chunks));
        }
    }
    for (int hidden = 1; hidden <= 400; ++hidden) {
        const Shape s{1, 64, 64, hidden, 64};
        int units = 0;
        for (int c = 0; c < s.chunks(); ++c) {
            expect(1 <= s.chunk_units(c) && s.chunk_units(c) <= 4, "a chunk has one to four units",
                   std::to_string(hidden));
            units += s.chunk_units(c);
        }
        expect(units * kUnit == s.hidden_padded() && s.hidden_padded() - hidden < kUnit, "no padding of F past 16",
               std::to_string(hidden));
    }
}

// wgmma_expand's activations, once the lanes of each quad have exchanged theirs as exchange_in_quad does: every element
// of a tile of two chunks is written once, and by who has it.
void hidden() {
    std::set<int> offsets;
    for (int warp = 0; warp < 4; ++warp) {
        for (int group = 0; group < 4; ++group) {
            for (int block = 0; block < 2; ++block) {
                for (int half = 0; half < 2; ++half) {
                    for (int lane = 0; lane < 32; ++lane) {
                        const int at = hidden_piece_offset(hidden_lane_offset(warp, lane), group, block, half);
                        offsets.insert(at);
                        for (int j = 0; j < 4; ++j) {
                            // register j of lane q was register q of lane j: two columns of n-tile q
                            const int from = lane / 4 * 4 + j, n_tile = group * 4 + lane % 4;
                            const Place place = c_place(from, 2 * half);
                            const int row = block * 64 + warp * 16 + place.row, column = n_tile * 8 + place.column;
                            expect(at + j * 4 == element_offset(kTileRows, row, column),
                                   "a piece holds the columns of its place", std::to_string(lane));
                        }
                    }
                }
            }
        }
    }
    expect(
        offsets.size() == 2 * kHiddenTileBytes / kPieceBytes && *offsets.rbegin() == 2 * kHiddenTileBytes - kPieceBytes,
        "a tile's activations fill it once", "two chunks");
    for (int chunks = 1; chunks <= 60; ++chunks) {
        for (int each = 1; each <= kExpandMostChunks; ++each) {
            for (int blocks = 1; blocks <= ceil_div(chunks, each); ++blocks) {
                std::vector<int> owners(chunks, 0);
                for (int block = 0; block < blocks; ++block) {
                    const HiddenTiles tiles{chunks, each, block, blocks};
                    expect(tiles.count() >= 1, "every block has a tile", std::to_string(chunks));
                    for (int tile = 0; tile < tiles.count(); ++tile) {
                        for (int i = 0; i < tiles.width(tile); ++i) ++owners[tiles.first(tile) + i];
                    }
                }
                for (const int times : owners) expect(times == 1, "a chunk has one tile", std::to_string(chunks));
            }
        }
    }
}

// wgmma_contract's sums: two warpgroups of two blocks of 64 rows, and the tiles along the columns.
void contracted() {
    for (const int columns : kContractColumns) {
        std::map<std::pair<int, int>, int> owners;
        for (int thread = 0; thread < 256; ++thread) {
            for (int i = 0; i < columns; ++i) {
                const Place place = c_place(thread % 32, i % (columns / 2) % 4);
                const int row = thread / 128 * kTileRows + i / (columns / 2) * 64 + thread % 128 / 32 * 16 + place.row;
                ++owners[{row, i % (columns / 2) / 4 * 8 + place.column}];
            }
        }
        expect(owners.size() == static_cast<size_t>(kContractRows) * columns &&
                   owners.rbegin()->first == std::make_pair(kContractRows - 1, columns - 1),
               "a tile's sums have one owner each", std::to_string(columns));
    }
    for (int out = 1; out <= 1100; ++out) {
        const int columns = contract_columns({1, out, out, 1, out});
        const int padded = round_up(out, kUnit), tiles = ceil_div(out, columns);
        expect((tiles - 1) * columns < padded && padded <= tiles * columns, "tiles of columns cover N, none empty",
               std::to_string(out));
    }
}

void descriptors() {
    for (uint32_t address = 0; address < 232448; address += 32) {
        const uint64_t d = tile_descriptor(address);
        expect((d & 0x3fff) == address / 16 && (d >> 32 & 0x3fff) == 64 && d >> 62 == 1 && (d >> 46 & 0xffff) == 0,
               "a descriptor", std::to_string(address));
    }
}

void plan_holds(const Plan& p, const Shape& s, const Device& d) {
    const std::string where = describe(s) + " on sm_" + std::to_string(d.sm) + ", " + name_of(p.kernel);
    expect(p.shared <= d.shared_limit, "shared memory fits", where);
    expect(p.splits >= 1 && p.splits <= s.chunks(), "no empty split", where);
    expect(p.splits == 1 || p.partial_bytes == int64_t{p.splits} * s.rows * s.out_padded() * 4, "room for partial sums",
           where);
    if (p.kernel == Kernel::fused || p.kernel == Kernel::split) {
        bool built = false;
        for (const FusedShape& shape : kFusedShapes) built |= shape.mt == p.mt && shape.nu == p.nu;
        expect(built && p.nu * 64 >= s.out && s.embed <= 512, "an instance that holds the shape", where);
        const FusedShared at = fused_shared(32 * p.mt, s);
        expect(at.x < at.w1 && at.w1 < at.w2 && at.w2 < at.hidden && at.hidden + 32 * p.mt * kRowBytes <= p.shared &&
                   32 * p.mt * stage_pitch(s.out_padded()) * 4 <= p.shared && at.w1 % 128 == 0 && at.hidden % 128 == 0,
               "shared tiles lie apart", where);
    } else if (p.kernel == Kernel::two_gemms) {
        expect(p.hidden_bytes == int64_t{s.rows} * s.hidden_padded() * 2, "room for hidden activations", where);
        expect(p.expand_columns >= 1 && p.expand_columns <= ceil_div(s.chunks(), 2), "every block of expand has a tile",
               where);
        expect(gemm_shared_bytes(32 * p.expand_mt) <= d.shared_limit, "expand's shared memory fits", where);
    } else if (p.kernel == Kernel::wgmma_gemms) {
        const ExpandShared at = expand_shared(s, p.slots);
        expect(at.ring % 1024 == 0 && kExpandSlotBytes % 1024 == 0 && kHiddenTileBytes % 1024 == 0 &&
                   contract_slot_bytes(p.nu) % 1024 == 0,
               "tiles start on whole swizzle atoms", where);
        expect(p.slots >= 2 && at.ring + p.slots * kExpandSlotBytes <= at.barriers &&
                   at.barriers + p.slots * 16 <= at.turns && at.turns % 8 == 0 && at.bytes <= p.shared &&
                   contract_shared_bytes(p.nu) <= p.shared,
               "barriers lie past the ring", where);
        expect(p.hidden_bytes == hidden_tile(s, row_tiles(s), 0) && row_tiles(s) * kTileRows >= s.rows,
               "room for the images of hidden activations", where);
        expect(p.expand_columns >= 1 && p.expand_columns <= ceil_div(s.chunks(), p.tile_chunks),
               "every block has a tile", where);
        expect(s.embed <= kExpandMaxEmbed && s.in_panels() * kPanel <= kExpandMaxEmbed, "a row fits in registers",
               where);
    } else {
        const WgmmaShared at = wgmma_shared(p.nu, s, p.slots);
        expect(at.ring % 1024 == 0 && at.slot_bytes % 1024 == 0, "tiles start on whole swizzle atoms", where);
        expect(p.slots >= 2 && at.ring + p.slots * at.slot_bytes <= at.barriers && at.barriers % 16 == 0,
               "barriers lie past the ring", where);
        expect(p.nu >= s.out_padded() && s.in_panels() * kPanel <= kFusedWidestEmbed, "rows and sums fit registers",
               where);
        expect(p.blocks >= 1 && p.blocks <= row_tiles(s) && p.blocks <= d.multiprocessors, "every block has a tile",
               where);
    }
}

void plans() {
    const Device devices[] = {
        {80, 108, 163 * 1024}, {86, 84, 99 * 1024}, {89, 128, 99 * 1024}, {90, 132, 227 * 1024}, {120, 170, 99 * 1024}};
    std::set<Kernel> seen;
    for (const Device& d : devices) {
        for (const int embed : {1, 17, 64, 153, 192, 193, 307, 345, 384, 385, 483, 512, 513, 768, 1024, 1664, 4096}) {
            for (const int hidden : {1, 16, 65, 307, 383, 921, 1276, 1536, 2927, 16384}) {
                for (const int rows : {1, 32, 197, 394, 1576, 6304, 12608, 50432, 60000}) {
                    for (const int less : {0, embed / 2}) {
                        const Shape s{rows, embed, embed - less, hidden, embed - less / 2};
                        const Kernel chosen = chosen_kernel(s, d);
                        seen.insert(chosen);
                        plan_holds(plan_of(chosen, s, d), s, d);
                        for (const Kernel kernel : kEvery) {
                            try {
                                plan_holds(plan_of(kernel, s, d), s, d);
                            } catch (const std::invalid_argument& refusal) {
                                expect(kernel != Kernel::two_gemms, "two_gemms take every shape", refusal.what());
                                expect(kernel != Kernel::wgmma_gemms || d.sm != 90 || s.embed > 768,
                                       "wgmma_gemms take every E up to 768 on sm_90", refusal.what());
                                expect(std::string(refusal.what()).find(describe(s)) != std::string::npos,
                                       "a refusal names its shape", refusal.what());
                            }
                        }
                    }
                }
            }
        }
    }
    for (const Device& d : devices) {  // an A100 has 164 KB an SM, two blocks of 86,784 bytes take 171.5
        const int small = blocks_an_sm(gemm_shared_bytes(64), d), large = blocks_an_sm(gemm_shared_bytes(96), d);
        expect(small == (d.shared_limit > 99 * 1024 ? 2 : 1) && large == (d.sm == 90 ? 2 : 1), "blocks an SM holds",
               std::to_string(d.sm));
    }
    expect(seen == std::set<Kernel>{Kernel::fused, Kernel::split, Kernel::two_gemms}, "what is chosen unasked",
           "a set of kernels");
}

}  // namespace

int main() {
    const std::pair<const char*, std::function<void()>> checks[] = {
        {"swizzle", swizzle}, {"fragments", fragments}, {"handover", handover},     {"weights", weights},
        {"tiles", tiles},     {"hidden", hidden},       {"contracted", contracted}, {"descriptors", descriptors},
        {"plans", plans}};
    for (const auto& [name, check] : checks) {
        const int before = faults;
        check();
        std::printf("%s %s\n", name, faults == before ? "holds" : "FAILS");
    }
    return faults == 0 ? 0 : 1;
}
