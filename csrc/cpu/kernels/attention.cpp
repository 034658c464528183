#include "attention.h"

#include "vmath.h"

namespace prunevit {
namespace PRUNEVIT_ISA {
namespace {

template <int M, int V>
void scores_tile(const float* k, int qk, const float* q, float* s, float* most) {
    Tile<M, V> acc = {};
    accumulate<M, V, true>(acc, k, qk, q, qk, {k, 0});
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

// The exponentials are taken while the scores are in registers.
template <int M, int V>
void weights_tile(const float* k, int qk, const float* q, float* p, float* total) {
    Tile<M, V> acc = {};
    accumulate<M, V, true>(acc, k, qk, q, qk, {k, 0});
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
        vf sum = {};  // chains of sums as short as a tile keep the rounding error small
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const vf weight = exp2(acc.at[i][v]);
            store(p + (i * V + v) * lanes, weight);
            sum += weight;
        }
        store(total + v * lanes, load(total + v * lanes) + sum);
    }
}

template <int M, int V>
void values_tile(const float* v, int v_dim, int keys, const float* p, float* o, bool add, Ahead ahead) {
    Tile<M, V> acc = {};
    accumulate<M, V, false>(acc, v, v_dim, p, keys, ahead);
    // Added last, as a product's blocks are.
    if (add)
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int w = 0; w < V; ++w) acc.at[i][w] += load(o + (i * V + w) * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int w = 0; w < V; ++w) store(o + (i * V + w) * lanes, acc.at[i][w]);
}

using KeysFunction = void (*)(const float*, int, const float*, float*, float*);
using ValuesFunction = void (*)(const float*, int, int, const float*, float*, bool, Ahead);

template <class Of>
INLINE void by_keys(const Of& of, const float* k, int qk, int keys, const float* q, int vectors, float* s, float* top) {
    const Tiles tiles = tiles_of(keys, rows_of[vectors]);
    for (int i = 0; i < tiles.count; ++i) {
        const int first = tiles.start(i);
        const KeysFunction function = instance<3>(tiles.size(i), vectors, of);
        function(k + (int64_t)first * qk, qk, q, s + first * vectors * lanes, top);
    }
}

}  // namespace

void copy_columns(const float* from, int64_t pitch, int n, int width, float* to) {
    const int whole = width / lanes * lanes, rest = width - whole;
    for (int r = 0; r < n; ++r, from += pitch, to += width) {
        for (int c = 0; c < whole; c += lanes) store(to + c, load(from + c));
        // a whole vector: what is too much is overwritten by the next row
        if (rest) store(to + whole, load_first(from + whole, rest));
    }
}

void transpose_in(const float* from, int64_t pitch, int count, int width, int vectors, float* to) {
    const int queries = vectors * lanes;
    for (int v = 0; v < vectors; ++v)
        for (int c = 0; c < width; c += lanes) {
            const int cols = width - c < lanes ? width - c : (int)lanes;
            vf rows[lanes];
#pragma GCC unroll 16
            for (int r = 0; r < lanes; ++r)
                rows[r] = v * lanes + r < count ? load_first(from + (v * lanes + r) * pitch + c, cols) : vf{};
            transpose(rows);
#pragma GCC unroll 16
            for (int d = 0; d < lanes; ++d)
                if (d < cols) store(to + (c + d) * queries + v * lanes, rows[d]);
        }
}

void transpose_out(const float* from, int vectors, int count, int width, const float* scale, float* to, int64_t pitch) {
    const int queries = vectors * lanes;
    for (int v = 0; v < vectors; ++v) {
        const vf by = load(scale + v * lanes);
        for (int c = 0; c < width; c += lanes) {
            const int cols = width - c < lanes ? width - c : (int)lanes;
            vf rows[lanes];
#pragma GCC unroll 16
            for (int d = 0; d < lanes; ++d) rows[d] = d < cols ? load(from + (c + d) * queries + v * lanes) * by : vf{};
            transpose(rows);
#pragma GCC unroll 16
            for (int r = 0; r < lanes; ++r)
                if (v * lanes + r < count) store_first(to + (v * lanes + r) * pitch + c, rows[r], cols);
        }
    }
}

void weights(const float* k, int qk, int keys, const float* q, int vectors, float* p, float* total) {
    const auto of = [](auto m, auto wide) -> KeysFunction { return weights_tile<m.value, wide.value>; };
    by_keys(of, k, qk, keys, q, vectors, p, total);
}

void scores(const float* k, int qk, int keys, const float* q, int vectors, float* s, float* most) {
    const auto of = [](auto m, auto wide) -> KeysFunction { return scores_tile<m.value, wide.value>; };
    by_keys(of, k, qk, keys, q, vectors, s, most);
}

void exponentials(float* s, int keys, int vectors, const float* most, float* total) {
    for (int v = 0; v < vectors; ++v) {
        const vf top = load(most + v * lanes);
        vf sum = load(total + v * lanes);
        for (int first = 0; first < keys; first += 16) {
            const int last = first + 16 < keys ? first + 16 : keys;
            vf part = {};
            for (int k = first; k < last; ++k) {
                const vf p = exp2(load(s + (k * vectors + v) * lanes) - top);
                store(s + (k * vectors + v) * lanes, p);
                part += p;
            }
            sum += part;
        }
        store(total + v * lanes, sum);
    }
}

void values(const float* v, int v_dim, int keys, const float* p, int vectors, float* o, bool add, Fetch& fetch) {
    const auto of = [](auto m, auto wide) -> ValuesFunction { return values_tile<m.value, wide.value>; };
    const Tiles tiles = tiles_of(v_dim, rows_of[vectors]);
    for (int i = 0; i < tiles.count; ++i) {
        const int first = tiles.start(i);
        const ValuesFunction function = instance<3>(tiles.size(i), vectors, of);
        function(v + first, v_dim, keys, p, o + first * vectors * lanes, add, next_line(fetch, v));
    }
}

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
