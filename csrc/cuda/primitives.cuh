// The instructions that C++ has no name for, one function each. Tests replace this file by an emulator of the same
// functions, so that the kernels run, unchanged, on a CPU.
#pragma once

#if defined(PRUNEVIT_EMULATE)
#include "emulator.h"
#else

#include <cstdint>

#include "arguments.h"

namespace prunevit::mlp {

#define PRUNEVIT_DEVICE __device__ __forceinline__

extern __shared__ __align__(1024) unsigned char shared_bytes[];

PRUNEVIT_DEVICE unsigned char* shared_memory() { return shared_bytes; }
PRUNEVIT_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// From here on all that was launched before has ended. Only now may the next launch begin, where it was launched to
// overlap: it waits for this one alone.
PRUNEVIT_DEVICE void await_launches() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

PRUNEVIT_DEVICE float fast_exp2(float v) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}
PRUNEVIT_DEVICE float fast_reciprocal(float v) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}

PRUNEVIT_DEVICE float fast_rsqrt(float v) {
    float out;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}

PRUNEVIT_DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }
PRUNEVIT_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

template <Dtype D>
PRUNEVIT_DEVICE float widen(uint16_t bits) {
    if constexpr (D == Dtype::bf16) {
        return float_of(uint32_t{bits} << 16);
    } else {
        float out;
        asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
        return out;
    }
}
// Two values rounded to nearest even; `low` lies first in memory.
template <Dtype D>
PRUNEVIT_DEVICE uint32_t narrow(float low, float high) {
    uint32_t out;
    if constexpr (D == Dtype::bf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    }
    return out;
}

// The compiler forgets where the value came from: what was computed from it before is computed again, not kept.
PRUNEVIT_DEVICE void forget(uint32_t& v) { asm volatile("" : "+r"(v)); }

PRUNEVIT_DEVICE float sum_of_eight_lanes(float v) {
    for (int step = 1; step < 8; step *= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}

// The same value in all lanes of a warp, told to the compiler: branches on it do not diverge.
PRUNEVIT_DEVICE int uniform(int v) { return __shfl_sync(0xffffffffu, v, 0); }
// The value of the lane whose number differs in the bits of `mask`.
PRUNEVIT_DEVICE uint32_t from_lane_across(uint32_t v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

// Asynchronous 16-byte copies, global to shared, in groups.
PRUNEVIT_DEVICE void copy_async(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// Only so many bytes are read; the rest of the piece becomes zeros.
PRUNEVIT_DEVICE void copy_async(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
PRUNEVIT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
PRUNEVIT_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

PRUNEVIT_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

template <Dtype D>
PRUNEVIT_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (D == Dtype::bf16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

}  // namespace prunevit::mlp

#endif
