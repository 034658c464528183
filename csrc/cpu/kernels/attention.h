// One head's query tile: lanes are queries, so that odd widths waste no lane and the softmax is vertical.
#pragma once
#include "simd.h"

namespace prunevit {
namespace PRUNEVIT_ISA {

enum { tile_vectors = 2, tile_queries = tile_vectors * lanes, widest_head = 128, key_block = 256 };

// One head of one image, copied to contiguous rows: in a packed row of all heads, a head's keys would fall on few cache
// sets.
struct HeadRows {
  const float *k, *v;  // [n, qk], [n, v]
  int n, qk, v_dim;
};

// Floats of scratch that a tile takes, whatever the head.
enum { tile_scratch = (2 * widest_head + key_block + 8) * tile_queries };

// columns [at, at + width) of n rows, contiguous
INLINE void copy_columns(const float* from, int64_t pitch, int n, int width, float* to) {
  for (int r = 0; r < n; ++r)
    for (int c = 0; c < width; ++c) to[(int64_t)r * width + c] = from[r * pitch + c];
}

// Cut `size` keys into equal blocks of at most key_block.
INLINE int key_blocks(int size) { return (size + key_block - 1) / key_block; }

// to[width][vectors * lanes] = the first `count` rows of `from`, transposed; lanes past count are zero
void transpose_in(const float* from, int64_t pitch, int count, int width, int vectors, float* to);
// rows of `to` = from[width][vectors * lanes] transposed
void transpose_out(const float* from, int vectors, int count, int width, float* to, int64_t pitch);

// s[keys][vectors * lanes] = k q; most[vectors * lanes] = max(most, s)
void scores(const float* k, int qk, int keys, const float* q, int vectors, float* s, float* most);
// s = exp2(s - most); total += s
void exponentials(float* s, int keys, int vectors, const float* most, float* total);
// o[v_dim][vectors * lanes] (+)= vᵀ p
void values(const float* v, int v_dim, int keys, const float* p, int vectors, float* o, bool add);

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
