// What the kernels share: rows of x in and out, LayerNorm, activations, a warp's product of two tiles.
#pragma once

#include "primitives.cuh"

namespace prunevit::mlp {

// Eight neighbouring 16-bit values, as one 16-byte copy carries them.
struct alignas(16) Piece {
    uint32_t pair[4];
};

template <Dtype D>
PRUNEVIT_DEVICE void widen(const Piece& piece, float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = widen<D>(static_cast<uint16_t>(piece.pair[i / 2] >> (i % 2 * 16)));
}
PRUNEVIT_DEVICE void forget(Piece& piece) {
#pragma unroll
    for (uint32_t& pair : piece.pair) forget(pair);
}
template <Dtype D>
PRUNEVIT_DEVICE Piece narrow(const float (&v)[8]) {
    Piece piece;
#pragma unroll
    for (int i = 0; i < 4; ++i) piece.pair[i] = narrow<D>(v[2 * i], v[2 * i + 1]);
    return piece;
}

// Channels c … c + 7 of a row as `channels` lists them (null: in order), zeros from `count` on. Nothing past column
// E of the row is read: what lies there may be another tensor's, or nobody's.
PRUNEVIT_DEVICE Piece load_piece(const Arguments& a, int row, int c, const int* channels, int count) {
    Piece piece{};
    if (row >= a.shape.rows || c >= count) return piece;
    const uint16_t* from = a.x + row * a.pitch;
    if (channels == nullptr && a.wide && c + 8 <= count) return *reinterpret_cast<const Piece*>(from + c);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (c + i < count) {
            const uint32_t bits = from[channels == nullptr ? c + i : channels[c + i]];
            piece.pair[i / 2] |= bits << (i % 2 * 16);
        }
    }
    return piece;
}

struct Statistics {
    float mean, rstd;
};

// (v − mean) · rstd in fp32, zeros from `count` on: dead columns must not meet the weights as −mean · rstd.
template <Dtype D>
PRUNEVIT_DEVICE Piece normalise(const Piece& raw, Statistics s, int c, int count) {
    float v[8];
    widen<D>(raw, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = c + i < count ? (v[i] - s.mean) * s.rstd : 0.0f;
    return narrow<D>(v);
}

// Mean and 1/σ of a row over all E channels, by eight neighbouring lanes; two passes, since one cancels.
template <Dtype D>
PRUNEVIT_DEVICE Statistics row_statistics(const Arguments& a, int row, int lane8) {
    const int embed = a.shape.embed;
    float sum = 0.0f, squares = 0.0f, v[8];
#pragma unroll 4
    for (int c = lane8 * 8; c < embed; c += 64) {
        widen<D>(load_piece(a, row, c, nullptr, embed), v);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += v[i];
    }
    const float mean = sum_of_eight_lanes(sum) / static_cast<float>(embed);
#pragma unroll 4
    for (int c = lane8 * 8; c < embed; c += 64) {
        widen<D>(load_piece(a, row, c, nullptr, embed), v);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float d = c + i < embed ? v[i] - mean : 0.0f;
            squares = fmaf(d, d, squares);
        }
    }
    return {mean, 1.0f / sqrtf(sum_of_eight_lanes(squares) / static_cast<float>(embed) + a.eps)};
}

// The widest row that the one-launch kernels hold in registers while they take its statistics.
constexpr int kFusedMaxEmbed = 512;

// LN of rows row0 … row0 + rows − 1 into a tile; rows past M become zeros. Called by `threads` threads, a multiple
// of 8 that divides 8 · rows; the row, MaxEmbed wide at most, stays in registers between the passes.
template <Dtype D, int MaxEmbed = kFusedMaxEmbed>
PRUNEVIT_DEVICE void normalise_tile(const Arguments& a, int row0, int rows, unsigned char* tile, int tile_rows,
                                    int thread, int threads) {
    constexpr int kEach = MaxEmbed / 64;
    const int lane8 = thread % 8, embed = a.shape.embed, in = a.shape.in;
    for (int row = thread / 8; row < rows; row += threads / 8) {
        Piece raw[kEach];
        float sum = 0.0f, squares = 0.0f, v[8];
#pragma unroll
        for (int i = 0; i < kEach; ++i) raw[i] = load_piece(a, row0 + row, (i * 8 + lane8) * 8, nullptr, embed);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            widen<D>(raw[i], v);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += v[j];
        }
        const float mean = sum_of_eight_lanes(sum) / static_cast<float>(embed);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            forget(raw[i]);  // else 64 widened values stay in registers
            widen<D>(raw[i], v);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float d = (i * 8 + lane8) * 8 + j < embed ? v[j] - mean : 0.0f;
                squares = fmaf(d, d, squares);
            }
        }
        const float variance = sum_of_eight_lanes(squares) / static_cast<float>(embed);
        const Statistics s{mean, 1.0f / sqrtf(variance + a.eps)};
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int c = (i * 8 + lane8) * 8;
            if (c >= a.shape.in_panels() * kPanel) continue;
            forget(raw[i]);
            const Piece from = a.reads == nullptr ? raw[i] : load_piece(a, row0 + row, c, a.reads, in);
            *reinterpret_cast<Piece*>(tile + element_offset(tile_rows, row, c)) = normalise<D>(from, s, c, in);
        }
    }
}

// x · Φ(x), Φ as in Abramowitz and Stegun 7.1.26: within 1.5e-7 of the exact erf form, in half of erff's instructions.
PRUNEVIT_DEVICE float gelu(float x) {
    const float size = fabsf(x);
    const float t = fast_reciprocal(fmaf(0.3275911f * 0.70710678f, size, 1.0f));
    float tail = 0.5f * 1.061405429f;
    tail = fmaf(tail, t, 0.5f * -1.453152027f);
    tail = fmaf(tail, t, 0.5f * 1.421413741f);
    tail = fmaf(tail, t, 0.5f * -0.284496736f);
    tail = fmaf(tail, t, 0.5f * 0.254829592f);
    tail *= t * fast_exp2(-0.5f * 1.44269504f * x * x);  // Φ(−|x|)
    return fmaf(-size, tail, fmaxf(x, 0.0f));
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
#pragma unroll 4
    for (int k = 0; k < k_steps; ++k) {
        const int panel = k / 4, piece = k % 4 * 2;
        // every row here is a multiple of 8 plus lane % 8: one exclusive-or serves all of them
        const uint32_t a_at = a_row + panel * a.rows * kRowBytes + ((piece + in_a.column) ^ (lane & 7)) * kPieceBytes;
        const uint32_t b_at = b_row + panel * b.rows * kRowBytes + ((piece + in_b.column) ^ (lane & 7)) * kPieceBytes;
        uint32_t fragment[MT][4];
#pragma unroll
        for (int m = 0; m < MT; ++m) load_matrices(fragment[m], a_at + m * kUnit * kRowBytes);
#pragma unroll
        for (int u = 0; u < NU; ++u) {
            if (first_unit + u * unit_step < units) {
                uint32_t weights[4];
                load_matrices(weights, b_at + u * unit_step * kUnit * kRowBytes);
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                    mma<D>(acc[m][2 * u], fragment[m], weights[0], weights[1]);
                    mma<D>(acc[m][2 * u + 1], fragment[m], weights[2], weights[3]);
                }
            }
        }
    }
}

// x[row, writes[n … n + 7]] += γ (v + b2), in fp32, rounded once.
template <Dtype D>
PRUNEVIT_DEVICE void add_residual(const Arguments& a, int row, int n, const float (&v)[8]) {
    uint16_t* to = a.x + row * a.pitch;
    const bool whole = a.writes == nullptr && a.wide && n + 8 <= a.shape.out;
    float old[8], sum[8];
    const Piece was = load_piece(a, row, n, a.writes, a.shape.out);
    widen<D>(was, old);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = fmaf(a.gamma[n + i], v[i] + a.b2[n + i], old[i]);
    const Piece now = narrow<D>(sum);
    if (whole) {
        *reinterpret_cast<Piece*>(to + n) = now;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (n + i < a.shape.out) {
            to[a.writes == nullptr ? n + i : a.writes[n + i]] =
                static_cast<uint16_t>(now.pair[i / 2] >> (i % 2 * 16));
        }
    }
}

// The fp32 tile of an epilogue, rows row0 …, columns column0 …, added into x by all threads of the block.
template <Dtype D>
PRUNEVIT_DEVICE void add_staged(const Arguments& a, const float* stage, int row0, int rows, int column0, int columns,
                                int thread, int threads) {
    const int left = a.shape.out_padded() - column0;
    const int pieces = (left < columns ? left : columns) / 8;
    for (int i = thread; i < rows * pieces; i += threads) {
        const int row = i / pieces, c = i % pieces * 8;
        if (row0 + row >= a.shape.rows) break;
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = stage[row * stage_pitch(columns) + c + j];
        add_residual<D>(a, row0 + row, column0 + c, v);
    }
}

}  // namespace prunevit::mlp
