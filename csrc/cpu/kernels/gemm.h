// Rows times packed panels. A tile is up to fourteen rows by one panel and lives in registers.
#pragma once
#include "simd.h"

namespace prunevit {
namespace PRUNEVIT_ISA {

// What becomes of a tile's sums. `part`, where not null, is added to them first.
enum class Into {
    scratch,   // c = sums, whole vectors, no bias
    linear,    // c = sums + bias
    residual,  // c += gamma * (sums + bias)
};

struct Dest {
    Into into;
    float* c;
    int64_t ldc;
    const float* part;
    int64_t ldpart;
    const float *bias, *gamma;
    int cols;             // columns of c that may be written
    const float* next_c;  // where the next panel's results go, or null
};

// c[rows, panel] = a[rows, k] b[k, panel]: `rows` is cut into equal tiles. vectors: the panel's width. next: the panel
// that is read after this one, fetched from memory meanwhile.
void multiply_panel(const float* a, int64_t lda, int rows, const float* b, int vectors, int k, const float* next,
                    const Dest& dest);

// Which blocks of rows a matrix is cut into, so that every thread has equally much and a block stays in the L2 cache.
struct RowBlocks {
    int64_t rows;
    int count;
};
INLINE RowBlocks row_blocks(int64_t rows, int threads) {
    const int64_t most = 112;
    int64_t count = (rows + most - 1) / most;
    if (rows >= threads) count = round_up(count, threads);
    return {rows, (int)count};
}
INLINE int64_t block_start(const RowBlocks& blocks, int block) { return blocks.rows * block / blocks.count; }
INLINE int64_t block_rows(const RowBlocks& blocks) { return (blocks.rows + blocks.count - 1) / blocks.count; }

// With fewer rows, threads share a linear's columns: every weight is read by one thread only.
INLINE bool few_rows(int64_t rows, int threads) { return rows < 24 * threads || rows < 48; }

INLINE int panel_vectors(const Linear& l, int p) { return p + 1 < l.panels ? l.panel : l.vectors - p * l.panel; }
INLINE int panel_column(const Linear& l, int p) { return p * l.panel * l.lanes; }
INLINE int64_t panel_weight(const Linear& l, int block, int p) {
    const int k = l.k_start[block + 1] - l.k_start[block];
    return (int64_t)l.k_start[block] * l.vectors * l.lanes + (int64_t)panel_column(l, p) * k;
}

INLINE const float* next_panel(const Linear& l, int block, int p) {
    const int next = p + 1 < l.panels ? p + 1 : 0;
    return l.weight + panel_weight(l, next == 0 && block + 1 < l.blocks ? block + 1 : block, next);
}

// Where linear_panel puts panel p in a residual row.
INLINE float* residual_start(const Linear& l, int p, float* row) {
    return l.writes == nullptr ? row + panel_column(l, p) : row;
}

enum { widest = max_vectors * lanes };

// One panel over one block of k: `a` has the block's inputs, `part` (rows x widest floats) the sums of those before.
// The last block goes into linear or residual. c is where the panel's first column goes; with linear.writes it is the
// row's first column, and results are added to the channels named there.
void panel_block(const Linear& linear, int block, int p, const float* a, int64_t lda, int rows, Into into, float* c,
                 int64_t ldc, float* part, int64_t ldpart);

// The same over all k, with all inputs in `a`.
void linear_panel(const Linear& linear, int p, const float* a, int64_t lda, int rows, Into into, float* c, int64_t ldc,
                  float* part);

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
