// A CPU's stand-in for csrc/cuda/primitives.cuh: the kernels run unchanged, one block at a time, a fiber a thread.
//
// What the hardware may do late happens as late as it may: an asynchronous copy lands when it is waited for, a wgmma
// reads its operands when it is waited for, and others run in between. With PRUNEVIT_EMULATE_EARLY set, copies land
// as they are issued instead: one hides what comes too late, the other what comes too soon. Shared memory starts as
// NaNs. Lanes of a warp that reach different collective instructions, addresses outside the block's shared memory, and
// deadlocks end the program by name.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "arguments.h"

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define PRUNEVIT_DEVICE inline

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};
inline Dim3 threadIdx, blockIdx, gridDim;

namespace prunevit::emulator {

[[noreturn]] inline void fail(const std::string& what) {
    std::fprintf(stderr, "emulator: block (%u, %u, %u) thread %u: %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
                 threadIdx.x, what.c_str());
    std::abort();
}

inline const bool early = std::getenv("PRUNEVIT_EMULATE_EARLY") != nullptr;

struct Copy {
    uint32_t to;
    const void* from;
    int bytes, read;
};

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    std::vector<char> stack;
    bool started = false, done = false;
    std::vector<std::vector<Copy>> groups;  // committed cp.async groups, oldest first
    std::vector<Copy> open;
};

struct Meeting {
    const char* what = nullptr;
    int arrived = 0, generation = 0;
    void* given[1024];
};

struct Block {
    std::vector<unsigned char> arena;
    unsigned char* shared = nullptr;
    int shared_bytes = 0, threads = 0;
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    std::map<int, Meeting> barriers;
    long progress = 0;
    jmp_buf scheduler;
    int current = 0;
    std::function<void()> body;
};
inline Block* block = nullptr;

inline Fiber& self() { return block->fibers[block->current]; }

inline void yield() {
    if (!_setjmp(self().at)) _longjmp(block->scheduler, 1);
}

inline void fiber_main() {
    block->body();
    if (!self().open.empty()) fail("cp.async that was never committed");
    self().done = true;
    ++block->progress;
    _longjmp(block->scheduler, 1);
}

// All of `expected` threads meet; the last one runs `last` over what each brought.
template <class Last>
void meet(Meeting& m, const char* what, int index, int expected, void* brought, Last last) {
    if (m.arrived == 0) m.what = what;
    if (std::strcmp(m.what, what) != 0) fail(std::string("diverged: ") + what + " where others are at " + m.what);
    m.given[index] = brought;
    if (++m.arrived == expected) {
        last(m.given);
        m.arrived = 0;
        ++m.generation;
        ++block->progress;
        return;
    }
    const int generation = m.generation;
    while (m.generation == generation) yield();
}
template <class Last>
void warp_meet(const char* what, void* brought, Last last) {
    meet(block->warps[threadIdx.x / 32], what, threadIdx.x % 32, 32, brought, last);
}

inline unsigned char* shared_at(uint32_t address, int bytes, int alignment) {
    if (address % alignment != 0) fail("misaligned shared address " + std::to_string(address));
    if (address + bytes > static_cast<uint32_t>(block->shared_bytes)) {
        fail("shared address " + std::to_string(address) + " past " + std::to_string(block->shared_bytes));
    }
    return block->shared + address;
}

inline void land(const Copy& copy) {
    unsigned char* to = shared_at(copy.to, copy.bytes, 16);
    if (copy.read > 0 && reinterpret_cast<uintptr_t>(copy.from) % 16 != 0) fail("misaligned global address of a copy");
    std::memset(to, 0, copy.bytes);
    std::memcpy(to, copy.from, copy.read);
}

inline void run_block(Block& b) {
    block = &b;
    std::memset(b.shared, 0xff, b.shared_bytes);  // NaN in every format
    b.fibers.clear();
    b.fibers.resize(b.threads);
    b.warps.assign(b.threads / 32, Meeting{});
    b.barriers.clear();
    int left = b.threads;
    unsigned drawn = 1;  // warps run apart: each sits out every other round or so, drawn alike in every run
    long seen = b.progress;
    for (int idle = 0; left > 0;) {
        for (int i = 0; i < b.threads; ++i) {
            Fiber& f = b.fibers[i];
            if (i % 32 == 0) drawn = drawn * 1664525u + 1013904223u;
            if (f.done || drawn >> 31) continue;
            b.current = i;
            threadIdx.x = i;
            if (!_setjmp(b.scheduler)) {
                if (f.started) _longjmp(f.at, 1);
                f.started = true;
                f.stack.resize(256 * 1024);
                getcontext(&f.start);
                f.start.uc_stack.ss_sp = f.stack.data();
                f.start.uc_stack.ss_size = f.stack.size();
                f.start.uc_link = nullptr;
                makecontext(&f.start, fiber_main, 0);
                setcontext(&f.start);
            }
            left -= b.fibers[b.current].done;
        }
        idle = b.progress == seen ? idle + 1 : 0;
        seen = b.progress;
        if (idle > 100) fail("deadlock");
    }
}

// `before` puts back to their beginnings the things of a block that this file does not know.
template <class Body>
void launch(Dim3 grid, int threads, int shared_bytes, Body body, void (*before)() = [] {}) {
    Block b;
    b.arena.resize(shared_bytes + 1024);
    b.shared = b.arena.data() + (1024 - reinterpret_cast<uintptr_t>(b.arena.data()) % 1024) % 1024;
    b.shared_bytes = shared_bytes;
    b.threads = threads;
    b.body = body;
    gridDim = grid;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                before();
                run_block(b);
            }
        }
    }
}

}  // namespace prunevit::emulator

inline void __syncthreads() {
    using namespace prunevit::emulator;
    meet(block->barriers[0], "__syncthreads", threadIdx.x, block->threads, nullptr, [](void**) {});
}

namespace prunevit::mlp {

inline unsigned char* shared_memory() { return emulator::block->shared; }
inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulator::block->shared);
}

inline void await_launches() {}  // one launch after another

inline float fast_exp2(float v) { return std::exp2(v); }
inline float fast_reciprocal(float v) { return 1.0f / v; }
inline float fast_rsqrt(float v) { return 1.0f / std::sqrt(v); }

inline uint32_t bits_of(float v) {
    uint32_t out;
    std::memcpy(&out, &v, 4);
    return out;
}
inline float float_of(uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

template <Dtype D>
inline float widen(uint16_t bits) {
    if constexpr (D == Dtype::bf16) {
        return float_of(uint32_t{bits} << 16);
    } else {
        const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
        float out = exponent == 31  ? (mantissa ? NAN : INFINITY)
                    : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                    : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
        return bits & 0x8000 ? -out : out;
    }
}
template <Dtype D>
inline uint16_t narrow_one(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    if (std::isnan(v)) return 0x7fff;
    if constexpr (D == Dtype::bf16) {
        return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    } else {
        const float size = std::fabs(v);
        if (size >= 65520.0f) return sign | 0x7c00;
        if (size < std::ldexp(1.0f, -14)) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
        const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
        return sign | static_cast<uint16_t>((rounded >> 13) - (112u << 10));
    }
}
template <Dtype D>
inline uint32_t narrow(float low, float high) {
    return narrow_one<D>(low) | uint32_t{narrow_one<D>(high)} << 16;
}

inline void forget(uint32_t&) {}

inline float sum_of_eight_lanes(float v) {
    emulator::warp_meet("shuffle", &v, [](void** given) {
        for (int first = 0; first < 32; first += 8) {
            float lanes[8];
            for (int i = 0; i < 8; ++i) lanes[i] = *static_cast<float*>(given[first + i]);
            // the butterfly's order of additions
            const float sum =
                ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
            for (int i = 0; i < 8; ++i) *static_cast<float*>(given[first + i]) = sum;
        }
    });
    return v;
}

inline int uniform(int v) { return v; }
inline uint32_t from_lane_across(uint32_t v, int mask) {
    struct Brought {
        uint32_t v;
        int mask;
    } brought{v, mask};
    emulator::warp_meet("shuffle across", &brought, [](void** given) {
        uint32_t before[32];
        for (int i = 0; i < 32; ++i) before[i] = static_cast<Brought*>(given[i])->v;
        for (int i = 0; i < 32; ++i)
            static_cast<Brought*>(given[i])->v = before[i ^ static_cast<Brought*>(given[i])->mask];
    });
    return brought.v;
}

inline void copy_async(uint32_t to, const void* from, int bytes) {
    if (emulator::early) {
        emulator::land({to, from, 16, bytes});
    } else {
        emulator::self().open.push_back({to, from, 16, bytes});
    }
}
inline void copy_async(uint32_t to, const void* from) { copy_async(to, from, 16); }
inline void commit_copies() {
    auto& f = emulator::self();
    f.groups.push_back(std::move(f.open));
    f.open.clear();
}
template <int Pending>
inline void wait_copies() {
    auto& groups = emulator::self().groups;
    while (static_cast<int>(groups.size()) > Pending) {
        for (const auto& copy : groups.front()) emulator::land(copy);
        groups.erase(groups.begin());
    }
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
    struct Brought {
        uint32_t* r;
        uint32_t address;
    } brought{r, address};
    emulator::warp_meet("ldmatrix", &brought, [](void** given) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            for (int lane = 0; lane < 32; ++lane) {
                const auto& row = *static_cast<Brought*>(given[matrix * 8 + lane / 4]);
                std::memcpy(&static_cast<Brought*>(given[lane])->r[matrix],
                            emulator::shared_at(row.address, 16, 16) + lane % 4 * 4, 4);
            }
        }
    });
}

// Fragment maps of the PTX manual, written out here on purpose: layout.h is what is under test.
template <Dtype D>
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Brought {
        float* c;
        const uint32_t* a;
        uint32_t b[2];
    } brought{c, a, {b0, b1}};
    emulator::warp_meet("mma", &brought, [](void** given) {
        float a[16][16], b[16][8];
        const auto at = [&](int lane) -> Brought& { return *static_cast<Brought*>(given[lane]); };
        for (int lane = 0; lane < 32; ++lane) {
            const int group = lane >> 2, inside = lane & 3;
            for (int i = 0; i < 8; ++i) {
                const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
                const int column = inside * 2 + (i & 1) + (i >= 4 ? 8 : 0);
                a[row][column] = widen<D>(static_cast<uint16_t>(at(lane).a[i / 2] >> (i % 2 * 16)));
            }
            for (int i = 0; i < 4; ++i) {
                const int row = inside * 2 + (i & 1) + (i >= 2 ? 8 : 0);
                b[row][group] = widen<D>(static_cast<uint16_t>(at(lane).b[i / 2] >> (i % 2 * 16)));
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = (lane & 3) * 2 + (i & 1);
                float sum = at(lane).c[i];
                for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
                at(lane).c[i] = sum;
            }
        }
    });
}

}  // namespace prunevit::mlp
