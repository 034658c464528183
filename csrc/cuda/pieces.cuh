// What the kernels share: pieces of rows, activations, a warp's product of two tiles.
#pragma once

#include "primitives.cuh"

namespace prunevit::mlp {

template <int N>
struct Constant {
    static constexpr int value = N;
};
// body(n) with n as a constant, for n from 1; what is more counts as Most. Products must run through straight code: a
// branch between two makes ptxas commit them one by one, and keeps loads from running ahead of them.
template <int Most, class Body>
PRUNEVIT_DEVICE void with_constant(int n, Body body) {
    if constexpr (Most > 1) {
        if (n < Most) return with_constant<Most - 1>(n, body);
    }
    body(Constant<Most>{});
}

// Eight neighbouring 16-bit values, as one 16-byte copy carries them.
struct alignas(16) Piece {
    uint32_t pair[4];
};

template <Dtype D>
PRUNEVIT_DEVICE void widen(const Piece& piece, float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = widen<D>(static_cast<uint16_t>(piece.pair[i / 2] >> (i % 2 * 16)));
}
template <Dtype D>
PRUNEVIT_DEVICE Piece narrow(const float (&v)[8]) {
    Piece piece;
#pragma unroll
    for (int i = 0; i < 4; ++i) piece.pair[i] = narrow<D>(v[2 * i], v[2 * i + 1]);
    return piece;
}

// The first `live` columns of a piece, zeros after them.
PRUNEVIT_DEVICE Piece first_columns(Piece piece, int live) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (live <= 2 * i + 1) piece.pair[i] = live == 2 * i + 1 ? piece.pair[i] & 0xffff : 0;
    }
    return piece;
}

// Channels c … c + 7 of a row as `channels` lists them (null: in order), zeros from `count` on. Past column E lies
// another tensor's, or nothing: it may be read, where a row follows, but nothing may come of it.
PRUNEVIT_DEVICE Piece load_piece(const Arguments& a, int row, int c, const int* channels, int count) {
    Piece piece{};
    if (row >= a.shape.rows || c >= count) return piece;
    const uint16_t* from = a.x + row * a.pitch;
    if (channels == nullptr && a.wide && (c + 8 <= count || row + 1 < a.shape.rows)) {
        piece = *reinterpret_cast<const Piece*>(from + c);
        return c + 8 <= count ? piece : first_columns(piece, count - c);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (c + i < count) {
            const uint32_t bits = from[channels == nullptr ? c + i : channels[c + i]];
            piece.pair[i / 2] |= bits << (i % 2 * 16);
        }
    }
    return piece;
}

// Two neighbouring fp32 values, as one load carries them.
struct alignas(8) Two {
    float v[2];
};

// A warpgroup's sums begin with the bias of their columns: nothing is left to add, or to wait for, once they are there.
template <int Count>
PRUNEVIT_DEVICE void begin_with(float (&sums)[Count], const float* bias, int lane) {
#pragma unroll
    for (int i = 0; i < Count; i += 4) {
        const Two two = *reinterpret_cast<const Two*>(bias + i * 2 + c_place(lane, 0).column);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i + j] = two.v[j % 2];
    }
}

// The other way: sums of 16 rows of a warp to fp32 rows `pitch` apart, of which `columns` (a multiple of 8) are kept.
// `to` is where the thread's first one goes, and `rows_left` how many rows there are from its own on.
template <int Count>
PRUNEVIT_DEVICE void store_sums(const float (&sums)[Count], float* to, int64_t pitch, int columns, int rows_left) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (half * 8 >= rows_left) break;
#pragma unroll
        for (int n = 0; n < Count / 4; ++n) {
            if (n * 8 >= columns) break;
            const float* const v = sums + n * 4 + half * 2;
            *reinterpret_cast<Two*>(to + half * 8 * pitch + n * 8) = {v[0], v[1]};
        }
    }
}

// x Φ(x) = max(x, 0) − |x| Φ(−|x|), and log2 Φ(−t) is nearly a polynomial: one special-function instruction and seven
// others, a third of erff's. The fit is minimax in |x| Φ's absolute error: 4e-7, 7e-7 as rounded; it goes on falling.
PRUNEVIT_DEVICE float gelu(float x) {
    const float size = fabsf(x);
    float power = -4.7488770e-04f;
    power = fmaf(power, size, 7.0933281e-03f);
    power = fmaf(power, size, -5.1844325e-02f);
    power = fmaf(power, size, -4.5997828e-01f);
    power = fmaf(power, size, -1.1507930e+00f);
    power = fmaf(power, size, -1.0000373e+00f);
    return fmaf(-size, fast_exp2(power), fmaxf(x, 0.0f));
}
PRUNEVIT_DEVICE float times_sigmoid(float x, float of) {
    return x * fast_reciprocal(1.0f + fast_exp2(-1.44269504f * of));
}

// The switch stands outside the loop: it is the same for the whole launch.
template <int Count>
PRUNEVIT_DEVICE void activate(float (&v)[Count], Act act) {
    switch (act) {
        case Act::gelu:
#pragma unroll
            for (int i = 0; i < Count; ++i) v[i] = gelu(v[i]);
            break;
        case Act::gelu_tanh:  // ½ x (1 + tanh u) = x σ(2u)
#pragma unroll
            for (int i = 0; i < Count; ++i) {
                v[i] = times_sigmoid(v[i], 2.0f * 0.7978845608f * fmaf(0.044715f * v[i] * v[i], v[i], v[i]));
            }
            break;
        case Act::quick_gelu:
#pragma unroll
            for (int i = 0; i < Count; ++i) v[i] = times_sigmoid(v[i], 1.702f * v[i]);
            break;
        case Act::relu:
#pragma unroll
            for (int i = 0; i < Count; ++i) v[i] = v[i] < 0.0f ? 0.0f : v[i];  // a NaN stays one
            break;
    }
}

// Where a warp's block of a tile begins, and how many rows the tile's panels have.
struct TileView {
    uint32_t address;
    int rows;
};

// acc += A · Bᵀ for one warp: 16 · MT rows of A from `row0`, and up to NU units of 16 rows of B, `first_unit` and
// every `unit_step` after it that lies below `units`. acc[m][2u], acc[m][2u + 1] are the two n-tiles of unit u.
template <Dtype D, int MT, int NU>
PRUNEVIT_DEVICE void multiply(float (&acc)[MT][2 * NU][4], TileView a, int row0, TileView b, int first_unit,
                              int unit_step, int units, int k_steps, int lane) {
    const Place in_a = a_address(lane), in_b = b_address(lane);
    const uint32_t a_row = a.address + (row0 + in_a.row) * kRowBytes;
    const uint32_t b_row = b.address + (first_unit * kUnit + in_b.row) * kRowBytes;
    const auto run = [&](auto most, auto all) {
#pragma unroll 4
        for (int k = 0; k < k_steps; ++k) {
            const int panel = k / 4, piece = k % 4 * 2;
            // every row here is a multiple of 8 plus lane % 8: one exclusive-or serves all of them
            const int a_piece = (piece + in_a.column) ^ (lane & 7), b_piece = (piece + in_b.column) ^ (lane & 7);
            const uint32_t a_at = a_row + panel * a.rows * kRowBytes + a_piece * kPieceBytes;
            const uint32_t b_at = b_row + panel * b.rows * kRowBytes + b_piece * kPieceBytes;
            uint32_t fragment[MT][4];
#pragma unroll
            for (int m = 0; m < MT; ++m) load_matrices(fragment[m], a_at + m * kUnit * kRowBytes);
#pragma unroll
            for (int u = 0; u < most.value; ++u) {
                if (!all.value && first_unit + u * unit_step >= units) continue;
                uint32_t weights[4];
                load_matrices(weights, b_at + u * unit_step * kUnit * kRowBytes);
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                    mma<D>(acc[m][2 * u], fragment[m], weights[0], weights[1]);
                    mma<D>(acc[m][2 * u + 1], fragment[m], weights[2], weights[3]);
                }
            }
        }
    };
    // Straight through, or loads do not run ahead of products. Tiles are as wide as their instance, or a unit less.
    const int last = first_unit + (NU - 1) * unit_step;
    if (last < units) {
        run(Constant<NU>{}, Constant<true>{});
    } else if (NU > 1 && last - unit_step < units) {
        run(Constant<(NU > 1 ? NU - 1 : 1)>{}, Constant<true>{});
    } else {
        run(Constant<NU>{}, Constant<false>{});
    }
}

}  // namespace prunevit::mlp
