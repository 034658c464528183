// Sums out of a kernel: from registers or a staged tile, added into the rows of x.
#pragma once

#include "pieces.cuh"

namespace prunevit::mlp {

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
            to[a.writes == nullptr ? n + i : a.writes[n + i]] = static_cast<uint16_t>(now.pair[i / 2] >> (i % 2 * 16));
        }
    }
}

// Lane q of a quad has columns 2q, 2q + 1 of four pieces; then it has all eight columns of the q-th.
PRUNEVIT_DEVICE void exchange_in_quad(uint32_t (&pairs)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
        const bool upper = (lane & bit) != 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if ((j & bit) != 0) continue;
            const uint32_t got = from_lane_across(upper ? pairs[j] : pairs[j + bit], bit);
            pairs[j] = upper ? got : pairs[j];
            pairs[j + bit] = upper ? pairs[j + bit] : got;
        }
    }
}

// 64 rows of a warpgroup's sums, whose columns begin at column0, added into x straight from registers, 32 columns at a
// time: sixteen bytes a lane, and with them whole sectors. `row` is the thread's first; its other one is 8 below. Ahead:
// the next columns' residual is on its way meanwhile, if there are eight registers to spare.
template <Dtype D, bool Ahead, int Half>
PRUNEVIT_DEVICE void add_sums(const Arguments& a, const float (&sums)[Half], int row, int column0, int lane) {
    constexpr int kGroups = (Half + 15) / 16;
    const int end = a.shape.out - column0 < 2 * Half ? a.shape.out : column0 + 2 * Half;
    const auto at_row = [&](int half) { return a.x + (row + half * 8) * a.pitch; };
    const auto column = [&](int group) { return column0 + group * 32 + lane % 4 * kPieceColumns; };
    const auto whole = [&](int n) { return a.writes == nullptr && a.wide && n + kPieceColumns <= end; };
    Piece was[2][2] = {};  // of a group of columns and of the next one, which is on its way
    const auto load = [&](int group) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            was[group % 2][half] = {};  // a value that may not be loaded must not seem to live on from before
            if (whole(column(group)) && row + half * 8 < a.shape.rows) {
                was[group % 2][half] = *reinterpret_cast<const Piece*>(at_row(half) + column(group));
            }
        }
    };
    if (Ahead) load(0);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        const int n = column(group);
        if (!Ahead || group + 1 < kGroups) load(Ahead ? group + 1 : group);
        float gamma[8] = {}, b2[8] = {};
        if (n < end) {
            load_eight(a.gamma + n, gamma);
            load_eight(a.b2 + n, b2);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t even[4] = {}, odd[4] = {};
#pragma unroll
            for (int j = 0; j < 4 && group * 16 + j * 4 < Half; ++j) {
                even[j] = bits_of(sums[group * 16 + j * 4 + half * 2]);
                odd[j] = bits_of(sums[group * 16 + j * 4 + half * 2 + 1]);
            }
            exchange_in_quad(even, lane);
            exchange_in_quad(odd, lane);
            if (n >= end || row + half * 8 >= a.shape.rows) continue;
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = gamma[i] * (float_of(i % 2 == 0 ? even[i / 2] : odd[i / 2]) + b2[i]);
            if (whole(n)) {
                float sum[8];
                widen<D>(was[group % 2][half], sum);
#pragma unroll
                for (int i = 0; i < 8; ++i) sum[i] += v[i];
                *reinterpret_cast<Piece*>(at_row(half) + n) = narrow<D>(sum);
                continue;
            }
#pragma unroll 1
            for (int i = n; i < n + 8 && i < end; ++i) {  // a loop, since there are many such places
                uint16_t* const at = at_row(half) + (a.writes == nullptr ? i : a.writes[i]);
                *at = static_cast<uint16_t>(narrow<D>(widen<D>(*at) + v[0], 0.0f));
#pragma unroll
                for (int j = 0; j < 7; ++j) v[j] = v[j + 1];
            }
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
