// What sm_90 adds: barriers that count bytes, bulk copies, warpgroups. Tests replace this file as well.
#pragma once

#include "primitives.cuh"

#if defined(PRUNEVIT_EMULATE)
#include "emulator_sm90.h"
#else

namespace prunevit::mlp {

PRUNEVIT_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After this and a __syncthreads, the copy engine sees the barriers too.
PRUNEVIT_DEVICE void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
PRUNEVIT_DEVICE void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
PRUNEVIT_DEVICE void barrier_arrive_expecting(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the phase of that parity to end; a fresh barrier is in phase 0, and phase 1 before it counts as ended.
PRUNEVIT_DEVICE void barrier_wait(uint32_t barrier, int parity) {
    uint32_t done = 0;
    while (done == 0) {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    }
}

// One thread copies up to 1 MB, a multiple of 16 bytes; the barrier counts them as they land.
PRUNEVIT_DEVICE void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// The line of 128 bytes comes into the L2 cache.
PRUNEVIT_DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// The same for a multiple of 16 bytes.
PRUNEVIT_DEVICE void prefetch_bulk(const void* from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Shared memory that this thread stored becomes visible to the tensor cores, once others have met it at a barrier.
PRUNEVIT_DEVICE void publish_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// `threads` threads meet; ids 1 … 15, since 0 is __syncthreads.
PRUNEVIT_DEVICE void meet(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

template <int Registers>
PRUNEVIT_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
PRUNEVIT_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Before the first of a group of products: earlier writes to their registers are done.
PRUNEVIT_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PRUNEVIT_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
PRUNEVIT_DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// The compiler may not move uses of these registers across this line.
template <int Count>
PRUNEVIT_DEVICE void pin(float (&d)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

}  // namespace prunevit::mlp

#endif
