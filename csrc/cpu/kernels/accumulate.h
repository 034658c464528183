// The inner loop of every product: M rows by V vectors of accumulators.
#pragma once
#include <type_traits>

#include "simd.h"

namespace prunevit {
namespace PRUNEVIT_ISA {

// Memory that will be wanted soon: one cache line is fetched for every k on the way, `stride` floats after the last.
struct Ahead {
    const float* at;
    int64_t stride;
};

template <int M, int V>
struct Tile {
    vf at[M][V];
};

// acc[i][v] += Σ_k a(i, k) b[k][v]. By rows: a(i, k) = a[i * lda + k]; by columns: a[k * lda + i].
// b has k rows of V vectors.
template <int M, int V, bool by_rows>
INLINE void accumulate(Tile<M, V>& acc, const float* a, int64_t lda, const float* b, int k, Ahead ahead) {
    // Up to nine rows have a pointer each, and step by one index; of more, three share a pointer, so that all addresses
    // stay in registers.
    enum { sharing = M > 9 ? 3 : 1 };
    const float* row[(M + sharing - 1) / sharing];
    if (by_rows) {
#pragma GCC unroll 16
        for (int i = 0; i < (M + sharing - 1) / sharing; ++i) row[i] = a + sharing * i * lda;
    }
    const auto step = [&](Tile<M, V>& sums, int p) __attribute__((always_inline)) {
        vf operand[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) operand[v] = load(b + (p * V + v) * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const vf left = splat(by_rows ? row[i / sharing][(i % sharing) * lda + p] : a[p * lda + i]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums.at[i][v] += left * operand[v];
        }
    };
    int p = 0;
    if (M * V < 8) {
        // Too few sums to keep the units busy, and long chains of them: several sets take turns.
        enum { sets = M * V < 4 ? 4 : 2 };
        Tile<M, V> set[sets] = {};
        for (; p + sets <= k; p += sets)
#pragma GCC unroll 4
            for (int s = 0; s < sets; ++s) step(set[s], p + s);
#pragma GCC unroll 4
        for (int s = 0; s < sets; ++s)
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) acc.at[i][v] += set[s].at[i][v];
    }
    for (; p < k; ++p) {
        __builtin_prefetch(ahead.at, 0, 2);
        ahead.at += ahead.stride;
        step(acc, p);
    }
}

// of(m, vectors), with both as constants: from 1 row to rows_of[vectors], from 1 vector to Most.
template <int Most, int V = 1, int M = 1, class Of>
INLINE auto instance(int m, int vectors, const Of& of) {
    if constexpr (V < Most) {
        if (vectors != V) return instance<Most, V + 1>(m, vectors, of);
    }
    if constexpr (M < rows_of[V]) {
        if (m != M) return instance<V, V, M + 1>(m, V, of);
    }
    return of(std::integral_constant<int, M>(), std::integral_constant<int, V>());
}

// `rows` cut into tiles of at most `most`, as equal as can be: the first `longer` have a row more than the others.
struct Tiles {
    int count, rows, longer;
    int start(int i) const { return i * rows + (i < longer ? i : longer); }
    int size(int i) const { return rows + (i < longer); }
};
INLINE Tiles tiles_of(int rows, int most) {
    const int count = (rows + most - 1) / most;
    return {count, rows / count, rows % count};
}

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
