// Rows of x into a tile, normalised.
#pragma once

#include "pieces.cuh"

namespace prunevit::mlp {

struct Statistics {
    float mean, rstd;
};

// (v − mean) · rstd in fp32, zeros from `count` on: dead columns must not meet the weights as −mean · rstd. As one
// multiply-add: 16-bit values whose mean is 2000 deviations have no deviation left to lose.
template <Dtype D>
PRUNEVIT_DEVICE Piece normalise(const Piece& raw, Statistics s, int c, int count) {
    const float shift = -s.mean * s.rstd;
    float v[8];
    widen<D>(raw, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = fmaf(v[i], s.rstd, shift);
    const Piece piece = narrow<D>(v);
    return c + 8 <= count ? piece : first_columns(piece, count - c);
}

template <Dtype D>
PRUNEVIT_DEVICE float sum_of(const Piece& raw) {
    float v[8];
    widen<D>(raw, v);
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// Σ (v − mean)² of a piece whose columns from `count` on are none.
template <Dtype D>
PRUNEVIT_DEVICE float squared_deviations(const Piece& raw, float mean, int c, int count) {
    float v[8], squares = 0.0f;
    widen<D>(raw, v);
    if (c + 8 <= count) {
#pragma unroll
        for (int i = 0; i < 8; ++i) squares = fmaf(v[i] - mean, v[i] - mean, squares);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float d = c + i < count ? v[i] - mean : 0.0f;
            squares = fmaf(d, d, squares);
        }
    }
    return squares;
}

// Mean and 1/σ of a row over all E channels, by eight neighbouring lanes; two passes, since one cancels. `piece_at(c)`
// is the row's piece of channels c … c + 7, zeros past E.
template <Dtype D, class PieceAt>
PRUNEVIT_DEVICE Statistics row_statistics(int embed, float eps, int lane8, PieceAt piece_at) {
    const float per_channel = 1.0f / static_cast<float>(embed);
    float sum = 0.0f, squares = 0.0f;
#pragma unroll 4
    for (int c = lane8 * 8; c < embed; c += kPanel) sum += sum_of<D>(piece_at(c));
    const float mean = sum_of_eight_lanes(sum) * per_channel;
#pragma unroll 4
    for (int c = lane8 * 8; c < embed; c += kPanel) squares += squared_deviations<D>(piece_at(c), mean, c, embed);
    return {mean, fast_rsqrt(fmaf(sum_of_eight_lanes(squares), per_channel, eps))};
}

// Rows row0 … of a tile of normalised ones, and who fills it: `threads` threads, eight a row.
struct RowTile {
    int row0, rows;       // of x, and how many
    unsigned char* tile;  // panels of `rows` rows
    int thread, threads;

    PRUNEVIT_BOTH int lane8() const { return thread % 8; }
    // where this thread's piece of a row and panel lies
    PRUNEVIT_DEVICE unsigned char* own(int row, int panel) const {
        return tile + panel * rows * kRowBytes + piece_offset(row, lane8());
    }
};

// The rows as they are, all copies on their way at once, as one group; zeros past column E and row M. With a list of
// reads nothing is copied: the statistics are over more channels than the tile has.
PRUNEVIT_DEVICE void fetch_rows(const Arguments& a, const RowTile& t) {
    const int embed = a.shape.embed, panels = a.shape.in_panels();
    for (int row = t.thread / 8; row < t.rows && a.reads == nullptr; row += t.threads / 8) {
        for (int panel = 0; panel < panels; ++panel) {
            const int c = panel * kPanel + t.lane8() * kPieceColumns,
                      left = t.row0 + row < a.shape.rows ? embed - c : 0;
            if (a.wide) {
                const int bytes = left <= 0 ? 0 : left < kPieceColumns ? left * 2 : kPieceBytes;
                const uint16_t* const from = a.x + (bytes > 0 ? (t.row0 + row) * a.pitch + c : 0);
                copy_async(shared_address(t.own(row, panel)), from, bytes);
            } else {
                *reinterpret_cast<Piece*>(t.own(row, panel)) = load_piece(a, t.row0 + row, c, nullptr, embed);
            }
        }
    }
    commit_copies();
}

// LN of a fetched row, in place, of which this thread has a piece a panel, all in registers.
template <Dtype D, int MostPanels>
PRUNEVIT_DEVICE void normalise_fetched(const Arguments& a, const RowTile& t, int row) {
    const int embed = a.shape.embed, panels = a.shape.in_panels(), c0 = t.lane8() * kPieceColumns;
    const float per_channel = 1.0f / static_cast<float>(embed);
    Piece raw[MostPanels] = {};
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int p = 0; p < MostPanels; ++p) {
        if (p < panels) raw[p] = *reinterpret_cast<const Piece*>(t.own(row, p));
    }
#pragma unroll
    for (int p = 0; p < MostPanels; ++p) {
        if (p < panels) sum += sum_of<D>(raw[p]);
    }
    const float mean = sum_of_eight_lanes(sum) * per_channel;
#pragma unroll
    for (int p = 0; p < MostPanels; ++p) {
        if (p < panels) squares += squared_deviations<D>(raw[p], mean, c0 + p * kPanel, embed);
    }
    const Statistics s{mean, fast_rsqrt(fmaf(sum_of_eight_lanes(squares), per_channel, a.eps))};
#pragma unroll
    for (int p = 0; p < MostPanels; ++p) {
        if (p < panels) {
            *reinterpret_cast<Piece*>(t.own(row, p)) = normalise<D>(raw[p], s, c0 + p * kPanel, embed);
        }
    }
}

// The same with a list of reads: the statistics are over all channels, of which the tile has some.
template <Dtype D>
PRUNEVIT_DEVICE void normalise_listed(const Arguments& a, const RowTile& t, int row) {
    const int embed = a.shape.embed, in = a.shape.in, from = t.row0 + row;
    const auto piece_at = [&](int c) { return load_piece(a, from, c, nullptr, embed); };
    const Statistics s = row_statistics<D>(embed, a.eps, t.lane8(), piece_at);
    for (int panel = 0; panel < a.shape.in_panels(); ++panel) {
        const int c = panel * kPanel + t.lane8() * kPieceColumns;
        *reinterpret_cast<Piece*>(t.own(row, panel)) = normalise<D>(load_piece(a, from, c, a.reads, in), s, c, in);
    }
}

// LN of the tile's rows. Each thread reads only what it copied itself, and so waits for no other. `Pending` groups of
// copies were committed after the rows'.
template <Dtype D, int Pending, int MostPanels>
PRUNEVIT_DEVICE void normalise_rows(const Arguments& a, const RowTile& t) {
    wait_copies<Pending>();
    for (int row = t.thread / 8; row < t.rows; row += t.threads / 8) {
        if (a.reads == nullptr) {
            normalise_fetched<D, MostPanels>(a, t, row);
        } else {
            normalise_listed<D>(a, t, row);
        }
    }
}

}  // namespace prunevit::mlp
