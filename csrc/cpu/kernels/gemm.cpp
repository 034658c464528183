#include "gemm.h"

#include "accumulate.h"

namespace prunevit {
namespace PRUNEVIT_ISA {
namespace {

template <int M, int V>
void tile(const float* a, int64_t lda, const float* b, int k, Ahead ahead, const Dest& dest) {
    Tile<M, V> acc = {};
    accumulate<M, V, true>(acc, a, lda, b, k, ahead);

    const Dest d = dest;
    // Added last: chains of sums as short as a block keep the rounding error small.
    if (d.part != nullptr)
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc.at[i][v] += load(d.part + i * d.ldpart + v * lanes);

#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
        float* c = d.c + v * lanes;
        const int cols = d.cols - v * lanes;
        if (d.into == Into::scratch) {
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) store(c + i * d.ldc, acc.at[i][v]);
            continue;
        }
        const vf bias = load(d.bias + v * lanes), gamma = load(d.gamma + v * lanes);
        if (d.into == Into::linear) {
            if (cols >= lanes) {
#pragma GCC unroll 16
                for (int i = 0; i < M; ++i) store(c + i * d.ldc, acc.at[i][v] + bias);
            } else if (cols > 0) {
#pragma GCC unroll 16
                for (int i = 0; i < M; ++i) store_first(c + i * d.ldc, acc.at[i][v] + bias, cols);
            }
        } else if (cols >= lanes) {
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) store(c + i * d.ldc, load(c + i * d.ldc) + gamma * (acc.at[i][v] + bias));
        } else if (cols > 0) {
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i)
                store_first(c + i * d.ldc, load_first(c + i * d.ldc, cols) + gamma * (acc.at[i][v] + bias), cols);
        }
    }
}

using TileFunction = void (*)(const float*, int64_t, const float*, int, Ahead, const Dest&);

// Add gamma times `from` (rows x widest, panel p's results with bias) to the channels that the linear writes.
void scatter_panel(const Linear& l, int p, const float* from, int64_t pitch, int rows, float* c, int64_t ldc) {
    const int column = panel_column(l, p);
    const int cols = l.out - column < panel_vectors(l, p) * lanes ? l.out - column : panel_vectors(l, p) * lanes;
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < cols; ++i) c[r * ldc + l.writes[column + i]] += l.gamma[column + i] * from[r * pitch + i];
}

}  // namespace

void multiply_panel(const float* a, int64_t lda, int rows, const float* b, int vectors, int k, const float* next,
                    const Dest& dest) {
    const Tiles tiles = tiles_of(rows, rows_of[vectors]);
    const int lines = (vectors * lanes + 15) / 16;  // 16 floats a cache line
    const auto of = [](auto m, auto wide) -> TileFunction { return tile<m.value, wide.value>; };
    Dest d = dest;
    for (int i = 0; i < tiles.count; ++i) {
        const int first = tiles.start(i);
        const TileFunction function = instance<max_vectors>(tiles.size(i), vectors, of);
        d.c = dest.c + first * dest.ldc;
        if (dest.part != nullptr) d.part = dest.part + first * dest.ldpart;
        // The first tiles share in fetching the next panel, the others fetch what the next panel's results go to, a
        // column of lines each. Spread over many tiles the requests wait for nobody.
        const bool results = dest.next_c != nullptr && tiles.count > lines;
        const int fetching = !results ? tiles.count : tiles.count > 2 * lines ? tiles.count - lines : lines;
        const int64_t size = (int64_t)k * vectors * lanes;
        Ahead ahead = {next + size * i / fetching, vectors * lanes / fetching};
        if (i >= fetching) ahead = {dest.next_c + (i - fetching) * 16, dest.ldc};
        function(a + first * lda, lda, b, k, ahead, d);
    }
}

void panel_block(const Linear& l, int block, int p, const float* a, int64_t lda, int rows, Into into, float* c,
                 int64_t ldc, float* part, int64_t ldpart) {
    const int column = panel_column(l, p);
    const bool last = block + 1 == l.blocks, scatter = last && l.writes != nullptr;
    Dest dest = {Into::scratch,    part,           ldpart, block == 0 ? nullptr : part, ldpart, l.bias + column,
                 l.gamma + column, l.out - column, nullptr};
    if (scatter) {
        dest.into = Into::linear;
        dest.cols = widest;
    } else if (last) {
        dest.into = into;
        dest.c = c;
        dest.ldc = ldc;
        dest.next_c = p + 1 < l.panels ? c + panel * lanes : nullptr;
    }
    multiply_panel(a, lda, rows, l.weight + panel_weight(l, block, p), panel_vectors(l, p),
                   l.k_start[block + 1] - l.k_start[block], next_panel(l, block, p), dest);
    if (scatter) scatter_panel(l, p, part, ldpart, rows, c, ldc);
}

void linear_panel(const Linear& l, int p, const float* a, int64_t lda, int rows, Into into, float* c, int64_t ldc,
                  float* part) {
    for (int block = 0; block < l.blocks; ++block)
        panel_block(l, block, p, a + l.k_start[block], lda, rows, into, c, ldc, part, widest);
}

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
