// Rows of the residual stream: layer norm, gathering.
#pragma once
#include "simd.h"

namespace prunevit {
namespace PRUNEVIT_ISA {

// y = (x - mean) / sqrt(var + eps) for `count` rows. Tokens may lie far from zero: the variance is taken around the
// mean, and what rounding took from the mean is found again as the mean of the differences, `left`, and subtracted too.
// Rows go through together because each is a chain of sums that waits for itself.
template <int count>
INLINE void normalise_together(const float* x, int64_t x_pitch, int n, float eps, float* y, int64_t y_pitch) {
    const int whole = n / lanes * lanes, rest = n - whole;
    vf sum[count], mean[count], left[count], squares[count], scale[count];
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) sum[r] = rest ? load_first(x + r * x_pitch + whole, rest) : vf{};
    for (int i = 0; i < whole; i += lanes)
#pragma GCC unroll 4
        for (int r = 0; r < count; ++r) sum[r] += load(x + r * x_pitch + i);
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) {
        mean[r] = sum_of(sum[r]) * splat(1.0f / (float)n);
        left[r] = squares[r] = vf{};
        if (rest) {
            const vf d = keep_first(load_first(x + r * x_pitch + whole, rest) - mean[r], rest);
            left[r] = d;
            squares[r] = d * d;
        }
    }
    for (int i = 0; i < whole; i += lanes)
#pragma GCC unroll 4
        for (int r = 0; r < count; ++r) {
            const vf d = load(x + r * x_pitch + i) - mean[r];
            left[r] += d;
            squares[r] += d * d;
        }
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) {
        left[r] = sum_of(left[r]) * splat(1.0f / (float)n);
        const vf variance = sum_of(squares[r]) * splat(1.0f / (float)n) - left[r] * left[r];
        const float above = variance[0] < 0 ? 0 : variance[0];  // rounding leaves less than nothing; NaN stays
        scale[r] = splat(1.0f / sqrtf(above + eps));
        left[r] *= scale[r];
    }
    for (int i = 0; i < whole; i += lanes)
#pragma GCC unroll 4
        for (int r = 0; r < count; ++r)
            store(y + r * y_pitch + i, (load(x + r * x_pitch + i) - mean[r]) * scale[r] - left[r]);
    if (rest)
#pragma GCC unroll 4
        for (int r = 0; r < count; ++r)
            store_first(y + r * y_pitch + whole,
                        (load_first(x + r * x_pitch + whole, rest) - mean[r]) * scale[r] - left[r], rest);
}

INLINE void normalise(const float* x, int n, float eps, float* y) { normalise_together<1>(x, 0, n, eps, y, 0); }

// With its own weight and bias: affine is [2, n].
INLINE void normalise_affine(const float* x, int n, float eps, const float* affine, float* y) {
    normalise(x, n, eps, y);
    for (int i = 0; i < n; ++i) y[i] = y[i] * affine[i] + affine[n + i];
}

// The normalised inputs of a linear for rows [first, last) of x, `pitch` floats apart in `to`. `row` holds one row.
INLINE void normalise_rows(const Matrix& x, int64_t first, int64_t last, float eps, const Linear& linear, float* row,
                           float* to, int64_t pitch) {
    const int n = (int)x.cols;
    int64_t r = first;
    if (linear.reads == nullptr) {
        for (; r + 4 <= last; r += 4)
            normalise_together<4>(x.data + r * x.pitch, x.pitch, n, eps, to + (r - first) * pitch, pitch);
        for (; r < last; ++r) normalise(x.data + r * x.pitch, n, eps, to + (r - first) * pitch);
    }
    for (; r < last; ++r) {
        normalise(x.data + r * x.pitch, n, eps, row);
        for (int i = 0; i < linear.in; ++i) to[(r - first) * pitch + i] = row[linear.reads[i]];
    }
}

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
