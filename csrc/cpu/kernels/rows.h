// Rows of the residual stream: layer norm, gathering.
#pragma once
#include "simd.h"

namespace prunevit {
namespace PRUNEVIT_ISA {

// y = (x - mean) / sqrt(var + eps). The variance is taken around the mean: tokens may lie far from zero.
INLINE void normalise(const float* x, int n, float eps, float* y) {
  const int whole = n / lanes * lanes, rest = n - whole;
  vf sum = {};
  for (int i = 0; i < whole; i += lanes) sum += load(x + i);
  if (rest) sum += load_first(x + whole, rest);
  const float mean = sum_of(sum) / n;

  vf squares = {};
  for (int i = 0; i < whole; i += lanes) {
    const vf d = load(x + i) - splat(mean);
    squares += d * d;
  }
  float tail = 0.0f;
  for (int i = whole; i < n; ++i) tail += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / sqrtf((sum_of(squares) + tail) / n + eps);

  for (int i = 0; i < whole; i += lanes) store(y + i, (load(x + i) - splat(mean)) * splat(scale));
  if (rest) store_first(y + whole, (load_first(x + whole, rest) - splat(mean)) * splat(scale), rest);
}

// With its own weight and bias: affine is [2, n].
INLINE void normalise_affine(const float* x, int n, float eps, const float* affine, float* y) {
  normalise(x, n, eps, y);
  for (int i = 0; i < n; ++i) y[i] = y[i] * affine[i] + affine[n + i];
}

// The normalised inputs of a linear for rows [first, last) of x, `pitch` floats apart in `to`. `row` holds one whole row.
INLINE void normalise_rows(const Matrix& x, int64_t first, int64_t last, float eps, const Linear& linear, float* row,
                           float* to, int64_t pitch) {
  for (int64_t r = first; r < last; ++r, to += pitch) {
    const float* from = x.data + r * x.pitch;
    if (linear.reads == nullptr) {
      normalise(from, (int)x.cols, eps, to);
    } else {
      normalise(from, (int)x.cols, eps, row);
      for (int i = 0; i < linear.in; ++i) to[i] = row[linear.reads[i]];
    }
  }
}

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
