// One head's query tile: lanes are queries, so that odd widths waste no lane and the softmax is vertical.
#pragma once
#include "accumulate.h"

namespace prunevit {
namespace PRUNEVIT_ISA {

enum { tile_vectors = 3, tile_queries = tile_vectors * lanes, widest_head = 128, key_block = 256 };

// Floats of scratch that a tile takes, whatever the head.
enum { tile_scratch = (2 * widest_head + key_block + 8) * tile_queries };

// Floats that the copy of one head's k or v takes for n tokens.
INLINE int64_t copied_floats(int64_t n, int width) { return n * width + lanes; }

// columns [0, width) of n rows, contiguous. In a packed row of all heads, a head's keys would fall on few cache sets.
void copy_columns(const float* from, int64_t pitch, int n, int width, float* to);

// to[width][vectors * lanes] = the first `count` rows of `from`, transposed; lanes past count are zero
void transpose_in(const float* from, int64_t pitch, int count, int width, int vectors, float* to);
// rows of `to` = from[width][vectors * lanes] transposed, each query times its `scale`
void transpose_out(const float* from, int vectors, int count, int width, const float* scale, float* to, int64_t pitch);

// p[keys][vectors * lanes] = exp2(k q); total += p. Overflows where a score is beyond 127.
void weights(const float* k, int qk, int keys, const float* q, int vectors, float* p, float* total);

// The same in two steps for scores of any size: s = k q and most = max(most, s), then s = exp2(s - most); total += s.
void scores(const float* k, int qk, int keys, const float* q, int vectors, float* s, float* most);
void exponentials(float* s, int keys, int vectors, const float* most, float* total);

// The columns of the rows that the next head reads: they lie pages apart, where no machine fetches ahead by itself.
struct Fetch {
    const float* starts[3];  // of the first row
    int widths[3];
    int64_t pitch;
    int part, column;  // how far it has come
};

// One line of every row, each time the next one; `idle` when all have been fetched.
INLINE Ahead next_line(Fetch& fetch, const float* idle) {
    while (fetch.part < 3) {
        if (fetch.column < fetch.widths[fetch.part] + 15) {
            const Ahead ahead = {fetch.starts[fetch.part] + fetch.column, fetch.pitch};
            fetch.column += 16;
            return ahead;
        }
        ++fetch.part;
        fetch.column = 0;
    }
    return {idle, 0};
}

// o[v_dim][vectors * lanes] (+)= vᵀ p
void values(const float* v, int v_dim, int keys, const float* p, int vectors, float* o, bool add, Fetch& fetch);

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
