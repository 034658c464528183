// Rows of x: into a tile, normalised; and out of it, added.
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
    float v[8], sum = 0.0f;
    widen<D>(raw, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += v[i];
    return sum;
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
            const int c = panel * kPanel + t.lane8() * kPieceColumns, left = t.row0 + row < a.shape.rows ? embed - c : 0;
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

// LN of what was fetched, in place: each thread reads only what it copied itself, and so waits for no other. `Pending`
// groups of copies were committed after the rows'.
template <Dtype D, int Pending>
PRUNEVIT_DEVICE void normalise_rows(const Arguments& a, const RowTile& t) {
    const int embed = a.shape.embed, in = a.shape.in, panels = a.shape.in_panels(), lane8 = t.lane8();
    wait_copies<Pending>();
    for (int row = t.thread / 8; row < t.rows; row += t.threads / 8) {
        const auto fetched = [&](int c) { return *reinterpret_cast<const Piece*>(t.own(row, c / kPanel)); };
        const auto listed = [&](int c) { return load_piece(a, t.row0 + row, c, nullptr, embed); };
        const Statistics s = a.reads == nullptr ? row_statistics<D>(embed, a.eps, lane8, fetched)
                                                : row_statistics<D>(embed, a.eps, lane8, listed);
#pragma unroll 2
        for (int panel = 0; panel < panels; ++panel) {
            const int c = panel * kPanel + lane8 * kPieceColumns;
            const Piece raw = a.reads == nullptr ? fetched(c) : load_piece(a, t.row0 + row, c, a.reads, in);
            *reinterpret_cast<Piece*>(t.own(row, panel)) = normalise<D>(raw, s, c, in);
        }
    }
}

// Four neighbouring fp32 values, as one load carries them.
struct alignas(16) Four {
    float v[4];
};
PRUNEVIT_DEVICE void load_eight(const float* from, float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        const Four four = *reinterpret_cast<const Four*>(from + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i + j] = four.v[j];
    }
}

// The first `count` of a piece's columns, fewer than 8, by as few stores as there are powers of two in it.
PRUNEVIT_DEVICE void store_first(uint16_t* to, const Piece& piece, int count) {
    struct alignas(8) Pairs {
        uint32_t pair[2];
    };
    const bool four = (count & 4) != 0, two = (count & 2) != 0;
    if (four) *reinterpret_cast<Pairs*>(to) = {piece.pair[0], piece.pair[1]};
    if (two) reinterpret_cast<uint32_t*>(to)[four ? 2 : 0] = four ? piece.pair[2] : piece.pair[0];
    const uint32_t last = four ? (two ? piece.pair[3] : piece.pair[2]) : (two ? piece.pair[1] : piece.pair[0]);
    if ((count & 1) != 0) to[count - 1] = static_cast<uint16_t>(last);
}

// x[row, writes[n … n + 7]] = was + γ (v + b2), in fp32, rounded once.
template <Dtype D>
PRUNEVIT_DEVICE void add_residual(const Arguments& a, int row, int n, const Piece& was, const float (&v)[8]) {
    const int left = a.shape.out - n;
    if (left <= 0) return;  // a tile's columns end on a multiple of 16, the residual's may not
    float sum[8], gamma[8], b2[8];
    widen<D>(was, sum);
    load_eight(a.gamma + n, gamma);
    load_eight(a.b2 + n, b2);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = fmaf(gamma[i], v[i] + b2[i], sum[i]);
    const Piece now = narrow<D>(sum);
    uint16_t* const to = a.x + row * a.pitch;
    if (a.writes == nullptr && a.wide) {
        if (left >= 8) {
            *reinterpret_cast<Piece*>(to + n) = now;
        } else {
            store_first(to + n, now, left);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i < left) {
            to[a.writes == nullptr ? n + i : a.writes[n + i]] =
                static_cast<uint16_t>(now.pair[i / 2] >> (i % 2 * 16));
        }
    }
}

// The fp32 tile of an epilogue, rows row0 …, columns column0 …, added into x by all threads of the block.
template <Dtype D>
PRUNEVIT_DEVICE void add_staged(const Arguments& a, const float* stage, int row0, int rows, int column0, int columns,
                                int thread, int threads) {
    constexpr int kBatch = 4;  // pieces of x that a thread has on their way at a time
    const int left = a.shape.out_padded() - column0, rows_left = a.shape.rows - row0;
    const int live = rows < rows_left ? rows : rows_left, pieces = (left < columns ? left : columns) / kPieceColumns;
    const int row_step = threads / pieces, piece_step = threads % pieces;
    int row = thread / pieces, piece = thread % pieces;
    while (row < live) {
        Piece was[kBatch];
        int rows_of[kBatch], pieces_of[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            rows_of[i] = row;
            pieces_of[i] = piece;
            if (row < live) was[i] = load_piece(a, row0 + row, column0 + piece * kPieceColumns, a.writes, a.shape.out);
            const bool next = piece + piece_step >= pieces;
            row += row_step + (next ? 1 : 0);
            piece += piece_step - (next ? pieces : 0);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (rows_of[i] >= live) continue;
            const int n = pieces_of[i] * kPieceColumns;
            float v[8];
            load_eight(stage + rows_of[i] * stage_pitch(columns) + n, v);
            add_residual<D>(a, row0 + rows_of[i], column0 + n, was[i], v);
        }
    }
}

}  // namespace prunevit::mlp
