// Vectors of the instruction set that this file is compiled for (PRUNEVIT_ISA names it and its namespace).
// Everything here is inlined or internal: nothing compiled for a wide machine may reach a narrow one by the linker.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../ops.h"

#define INLINE static inline __attribute__((always_inline))

namespace prunevit {
namespace PRUNEVIT_ISA {

#if defined(__AVX512F__)
enum { lanes = 16 };
#elif defined(__AVX2__)
enum { lanes = 8 };
#else
enum { lanes = 4 };
#endif

// A panel is `panel` vectors wide, the last one up to max_vectors; rows_of[v] rows of v accumulators fill the registers
// and leave room for the operands. Three by nine loads 12 numbers for 27 multiply-adds where two by fourteen loads 16
// for 28: no difference on a core that is ours alone, 5 % where another thread shares its front end.
#if defined(__AVX512F__)
enum { panel = 3, max_vectors = 4 };
#else
enum { panel = 2, max_vectors = 3 };
#endif
#if defined(__AVX512F__)
constexpr int rows_of[max_vectors + 1] = {0, 14, 14, 9, 6};
#elif defined(__aarch64__)
constexpr int rows_of[max_vectors + 1] = {0, 14, 12, 8};
#elif defined(__AVX2__)
constexpr int rows_of[max_vectors + 1] = {0, 10, 6, 4};
#else
constexpr int rows_of[max_vectors + 1] = {0, 8, 5, 3};
#endif

typedef float vf __attribute__((vector_size(lanes * 4)));
typedef int32_t vi __attribute__((vector_size(lanes * 4)));

INLINE vf splat(float x) { return x - vf{}; }

INLINE vf load(const float* p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

// The first n lanes (1 ≤ n ≤ lanes); memory past them is not touched, lanes past them are zero. The sanitizer does not
// see into masked instructions, so it gets the plain loops.
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)
INLINE vf load_first(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps((__mmask16)(0xFFFFu >> (16 - n)), p); }
INLINE void store_first(float* p, vf v, int n) {
    _mm512_mask_storeu_ps(p, (__mmask16)(0xFFFFu >> (16 - n)), (__m512)v);
}
#elif defined(__AVX2__) && !defined(__SANITIZE_ADDRESS__)
INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE vf load_first(const float* p, int n) { return (vf)_mm256_maskload_ps(p, first(n)); }
INLINE void store_first(float* p, vf v, int n) { _mm256_maskstore_ps(p, first(n), (__m256)v); }
#else
INLINE vf load_first(const float* p, int n) {
    vf v = {};
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
}
INLINE void store_first(float* p, vf v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
}
#endif

// x with zeros in the lanes from n on.
#if defined(__AVX512F__)
INLINE vf keep_first(vf x, int n) { return (vf)_mm512_maskz_mov_ps((__mmask16)(0xFFFFu >> (16 - n)), (__m512)x); }
#else
INLINE vf keep_first(vf x, int n) {
    vi lane;
    for (int l = 0; l < lanes; ++l) lane[l] = l;
    return (vf)((vi)x & (lane < n));
}
#endif

// Where a lane of b is NaN, so is the result.
#if defined(__AVX512F__)
INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__)
INLINE vf vmax(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
INLINE vf vmin(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
#else
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
#endif

INLINE vf vabs(vf x) { return (vf)((vi)x & 0x7fffffff); }

// Lane l of the result is lane from[l] of a and b, one after the other.
INLINE vf shuffle(vf a, vf b, vi from) {
#if defined(__clang__)
    vf to;
    for (int l = 0; l < lanes; ++l) to[l] = from[l] < lanes ? a[from[l]] : b[from[l] - lanes];
    return to;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

// Lane l of the result is lane `l ^ by` of v.
INLINE vf exchange(vf v, int by) {
    vi from;
    for (int l = 0; l < lanes; ++l) from[l] = l ^ by;
    return shuffle(v, v, from);
}

// In every lane the sum over all lanes.
INLINE vf sum_of(vf v) {
#pragma GCC unroll 4
    for (int by = lanes / 2; by > 0; by /= 2) v += exchange(v, by);
    return v;
}

// Transpose lanes x lanes floats: one butterfly a bit of the index.
INLINE void transpose(vf (&rows)[lanes]) {
#pragma GCC unroll 4
    for (int h = lanes / 2; h > 0; h /= 2) {
        vi low, high;
        for (int l = 0; l < lanes; ++l) {
            low[l] = l & h ? lanes + l - h : l;
            high[l] = l & h ? lanes + l : l + h;
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
            if (i & h) continue;
            const vf a = rows[i], b = rows[i + h];
            rows[i] = shuffle(a, b, low);
            rows[i + h] = shuffle(a, b, high);
        }
    }
}

INLINE float max_of(vf v) {
    float most = v[0];
    for (int i = 1; i < lanes; ++i) most = v[i] > most || v[i] != v[i] ? v[i] : most;
    return most;
}

INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Run body(item, scratch) for every item on the pool's threads.
template <class F>
INLINE void each(Pool& pool, int items, const F& body) {
    const Body call = [](const void* context, int item, float* scratch) {
        (*static_cast<const F*>(context))(item, scratch);
    };
    pool.run(items, call, &body);
}

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
