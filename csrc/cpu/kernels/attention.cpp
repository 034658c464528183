#include "attention.h"

#include "accumulate.h"
#include "vmath.h"

namespace prunevit {
namespace PRUNEVIT_ISA {
namespace {

template <int M, int V>
void scores_tile(const float* k, int qk, const float* q, float* s, float* most) {
  Tile<M, V> acc = {};
  accumulate<M, V, true>(acc, k, qk, q, qk);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    vf top = load(most + v * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      top = vmax(top, acc.at[i][v]);
      store(s + (i * V + v) * lanes, acc.at[i][v]);
    }
    store(most + v * lanes, top);
  }
}

template <int M, int V>
void values_tile(const float* v, int v_dim, int keys, const float* p, float* o, bool add) {
  Tile<M, V> acc;
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < V; ++w) acc.at[i][w] = add ? load(o + (i * V + w) * lanes) : vf{};
  accumulate<M, V, false>(acc, v, v_dim, p, keys);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < V; ++w) store(o + (i * V + w) * lanes, acc.at[i][w]);
}

using ScoresFunction = void (*)(const float*, int, const float*, float*, float*);
using ValuesFunction = void (*)(const float*, int, int, const float*, float*, bool);

template <int V>
ScoresFunction scores_of(int m) {
  switch (m) {
#define CASE(M) \
  case M:       \
    return scores_tile<(M <= rows_of[V] ? M : 1), V>;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13)
#undef CASE
    default:
      return scores_tile<rows_of[V], V>;
  }
}

template <int V>
ValuesFunction values_of(int m) {
  switch (m) {
#define CASE(M) \
  case M:       \
    return values_tile<(M <= rows_of[V] ? M : 1), V>;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13)
#undef CASE
    default:
      return values_tile<rows_of[V], V>;
  }
}

}  // namespace

void transpose_in(const float* from, int64_t pitch, int count, int width, int vectors, float* to) {
  const int queries = vectors * lanes;
  for (int r = 0; r < queries; ++r)
    for (int c = 0; c < width; ++c) to[c * queries + r] = r < count ? from[r * pitch + c] : 0.0f;
}

void transpose_out(const float* from, int vectors, int count, int width, float* to, int64_t pitch) {
  const int queries = vectors * lanes;
  for (int r = 0; r < count; ++r)
    for (int c = 0; c < width; ++c) to[r * pitch + c] = from[c * queries + r];
}

void scores(const float* k, int qk, int keys, const float* q, int vectors, float* s, float* most) {
  const int tiles = tile_count(keys, rows_of[vectors]);
  for (int i = 0; i < tiles; ++i) {
    const int first = tile_start(keys, tiles, i), m = tile_start(keys, tiles, i + 1) - first;
    const ScoresFunction function = vectors == 1 ? scores_of<1>(m) : scores_of<2>(m);
    function(k + (int64_t)first * qk, qk, q, s + first * vectors * lanes, most);
  }
}

void exponentials(float* s, int keys, int vectors, const float* most, float* total) {
  for (int v = 0; v < vectors; ++v) {
    const vf top = load(most + v * lanes);
    vf sum = load(total + v * lanes);
    for (int k = 0; k < keys; ++k) {
      const vf p = exp2(load(s + (k * vectors + v) * lanes) - top);
      store(s + (k * vectors + v) * lanes, p);
      sum += p;
    }
    store(total + v * lanes, sum);
  }
}

void values(const float* v, int v_dim, int keys, const float* p, int vectors, float* o, bool add) {
  const int tiles = tile_count(v_dim, rows_of[vectors]);
  for (int i = 0; i < tiles; ++i) {
    const int first = tile_start(v_dim, tiles, i), m = tile_start(v_dim, tiles, i + 1) - first;
    const ValuesFunction function = vectors == 1 ? values_of<1>(m) : values_of<2>(m);
    function(v + first, v_dim, keys, p, o + first * vectors * lanes, add);
  }
}

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
