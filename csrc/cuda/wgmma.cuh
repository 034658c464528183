// wgmma: a warpgroup's asynchronous products, m64nNk16, 16-bit in and fp32 out. sm_90a only.
//
// Operands lie in shared memory, or A in registers; every tile is K-major, in panels of 128-byte swizzled rows, so one
// kind of descriptor serves. The operand lists are long because each accumulator register must be named.
#pragma once

#include "primitives_sm90.cuh"

#if !defined(PRUNEVIT_EMULATE)

namespace prunevit::mlp {

// "+f" for eight accumulators at a time.
#define PRUNEVIT_EIGHT(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define PRUNEVIT_16(d, i) PRUNEVIT_EIGHT(d, i), PRUNEVIT_EIGHT(d, i + 8)
#define PRUNEVIT_32(d, i) PRUNEVIT_16(d, i), PRUNEVIT_16(d, i + 16)
#define PRUNEVIT_64(d, i) PRUNEVIT_32(d, i), PRUNEVIT_32(d, i + 32)

// The same registers as the instruction names them: the first so many.
#define PRUNEVIT_D16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PRUNEVIT_D32 PRUNEVIT_D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PRUNEVIT_D48 PRUNEVIT_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define PRUNEVIT_D64 PRUNEVIT_D48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PRUNEVIT_D80 PRUNEVIT_D64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define PRUNEVIT_D88 PRUNEVIT_D80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define PRUNEVIT_D96 PRUNEVIT_D88 ", %88, %89, %90, %91, %92, %93, %94, %95"

// d += A · Bᵀ, 64 × N × 16, both from shared memory.
template <Dtype D, int N>
PRUNEVIT_DEVICE void multiply_shared(float (&d)[N / 2], uint64_t a, uint64_t b) {
    static_assert(N == 32 || N == 64 || N == 128 || N == 160 || N == 176 || N == 192,
                  "an accumulator width with an instruction here");
#define PRUNEVIT_ONE(N, TYPE, LIST, A, B, ...) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" LIST "}, " A ", " B \
                 ", 1, 1, 1, 0, 0;" \
                 : __VA_ARGS__ \
                 : "l"(a), "l"(b))
#define PRUNEVIT_SHARED(N, ...) \
    if constexpr (D == Dtype::bf16) { \
        PRUNEVIT_ONE(N, "bf16", __VA_ARGS__); \
    } else { \
        PRUNEVIT_ONE(N, "f16", __VA_ARGS__); \
    }
    if constexpr (N == 32) {
        PRUNEVIT_SHARED("32", PRUNEVIT_D16, "%16", "%17", PRUNEVIT_16(d, 0))
    } else if constexpr (N == 64) {
        PRUNEVIT_SHARED("64", PRUNEVIT_D32, "%32", "%33", PRUNEVIT_32(d, 0))
    } else if constexpr (N == 128) {
        PRUNEVIT_SHARED("128", PRUNEVIT_D64, "%64", "%65", PRUNEVIT_64(d, 0))
    } else if constexpr (N == 160) {
        PRUNEVIT_SHARED("160", PRUNEVIT_D80, "%80", "%81", PRUNEVIT_64(d, 0), PRUNEVIT_16(d, 64))
    } else if constexpr (N == 176) {
        PRUNEVIT_SHARED("176", PRUNEVIT_D88, "%88", "%89", PRUNEVIT_64(d, 0), PRUNEVIT_16(d, 64), PRUNEVIT_EIGHT(d, 80))
    } else {
        PRUNEVIT_SHARED("192", PRUNEVIT_D96, "%96", "%97", PRUNEVIT_64(d, 0), PRUNEVIT_32(d, 64))
    }
#undef PRUNEVIT_ONE
#undef PRUNEVIT_SHARED
}

// d += A · Bᵀ, 64 × N × 16, A from registers. They are read until the product has been waited for.
template <Dtype D, int N>
PRUNEVIT_DEVICE void multiply_wide(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
    static_assert(N == 160 || N == 176 || N == 192, "an accumulator width with an instruction here");
#define PRUNEVIT_ONE(N, TYPE, LIST, A, B, ...) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" LIST "}, {" A "}, " B \
                 ", 1, 1, 1, 0;" \
                 : __VA_ARGS__ \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define PRUNEVIT_WIDE(N, ...) \
    if constexpr (D == Dtype::bf16) { \
        PRUNEVIT_ONE(N, "bf16", __VA_ARGS__); \
    } else { \
        PRUNEVIT_ONE(N, "f16", __VA_ARGS__); \
    }
    if constexpr (N == 160) {
        PRUNEVIT_WIDE("160", PRUNEVIT_D80, "%80, %81, %82, %83", "%84", PRUNEVIT_64(d, 0), PRUNEVIT_16(d, 64))
    } else if constexpr (N == 176) {
        PRUNEVIT_WIDE("176", PRUNEVIT_D88, "%88, %89, %90, %91", "%92", PRUNEVIT_64(d, 0), PRUNEVIT_16(d, 64),
                      PRUNEVIT_EIGHT(d, 80))
    } else {
        PRUNEVIT_WIDE("192", PRUNEVIT_D96, "%96, %97, %98, %99", "%100", PRUNEVIT_64(d, 0), PRUNEVIT_32(d, 64))
    }
#undef PRUNEVIT_ONE
#undef PRUNEVIT_WIDE
}

}  // namespace prunevit::mlp

#endif
