// The emulator's half of csrc/cuda/primitives_sm90.cuh and wgmma.cuh.
//
// A bulk copy lands when someone waits for its barrier and nothing else is left to arrive there; a product runs when
// its group is waited for, and reads its operands then: registers and shared memory that changed too early show.
#pragma once

#include "primitives.cuh"

namespace prunevit::emulator {

struct Barrier {
    int arrivals = 0, left = 0, phase = 0;
    long bytes = 0;  // still to land
    std::vector<Copy> copies;
};
struct Product {
    float* d;
    const uint32_t* a_registers;
    uint64_t a, b;
    int columns;
    bool bf16;
};
struct Warpgroup {
    Meeting meeting;
};

inline std::map<uint32_t, Barrier> barriers;
inline std::map<int, Warpgroup> warpgroups;
inline std::map<int, std::vector<std::vector<Product>>> groups;  // committed products of each thread, oldest first
inline std::map<int, std::vector<Product>> open_group;

inline Barrier& barrier_at(uint32_t address) {
    shared_at(address, 8, 8);
    if (barriers.count(address) == 0) fail("a barrier that nobody initialised");
    return barriers[address];
}
inline void end_phase_if_complete(Barrier& b) {
    if (b.left == 0 && b.bytes == 0) {
        b.left = b.arrivals;
        b.phase ^= 1;
        ++block->progress;
    }
}

// Element (row, k) of a K-major tile: the PTX manual's matrix descriptor, swizzle mode 1 (128 bytes).
inline uint16_t operand(uint64_t descriptor, int row, int k) {
    if (descriptor >> 62 != 1) fail("a descriptor without 128-byte swizzle");
    const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    const uint32_t flat = start + row / 8 * stride + row % 8 * 128 + k * 2;
    uint16_t bits;
    std::memcpy(&bits, shared_at(flat ^ (flat >> 7 & 7) << 4, 2, 2), 2);
    return bits;
}

template <prunevit::mlp::Dtype D>
void multiply_all(void** given, int columns) {
    using prunevit::mlp::widen;
    const auto at = [&](int thread) -> Product& { return *static_cast<Product*>(given[thread]); };
    const Product& one = at(0);
    std::vector<float> a(64 * 16), b(columns * 16);
    for (int row = 0; row < 64; ++row) {
        for (int k = 0; k < 16; ++k) {
            if (one.a_registers == nullptr) {
                a[row * 16 + k] = widen<D>(operand(one.a, row, k));
            } else {
                const int thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
                const uint32_t pair = at(thread).a_registers[row % 16 / 8 + k / 8 * 2];
                a[row * 16 + k] = widen<D>(static_cast<uint16_t>(pair >> (k % 2 * 16)));
            }
        }
    }
    for (int n = 0; n < columns; ++n) {
        for (int k = 0; k < 16; ++k) b[n * 16 + k] = widen<D>(operand(one.b, n, k));
    }
    for (int row = 0; row < 64; ++row) {
        for (int n = 0; n < columns; ++n) {
            const int thread = row / 16 * 32 + row % 8 * 4 + n % 8 / 2;
            float& d = at(thread).d[n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
            for (int k = 0; k < 16; ++k) d += a[row * 16 + k] * b[n * 16 + k];
        }
    }
}

inline void run_product(Product& product) {
    for (int i = 0; i < 2; ++i) yield();  // whoever could overwrite the operands by now has the time to
    meet(warpgroups[threadIdx.x / 128].meeting, "wgmma", threadIdx.x % 128, 128, &product, [&](void** given) {
        for (int thread = 1; thread < 128; ++thread) {
            const auto& other = *static_cast<Product*>(given[thread]);
            if (other.b != product.b || other.a != product.a) {
                fail("a wgmma with unlike operands in one warpgroup");
            }
        }
        product.bf16 ? multiply_all<prunevit::mlp::Dtype::bf16>(given, product.columns)
                     : multiply_all<prunevit::mlp::Dtype::fp16>(given, product.columns);
    });
}

inline void reset_sm90() {
    barriers.clear();
    warpgroups.clear();
    groups.clear();
    open_group.clear();
}

}  // namespace prunevit::emulator

namespace prunevit::mlp {

inline void barrier_init(uint32_t barrier, int arrivals) {
    emulator::shared_at(barrier, 8, 8);
    emulator::barriers[barrier] = {arrivals, arrivals, 0, 0, {}};
}
inline void barriers_ready() {}
inline void barrier_arrive(uint32_t barrier) {
    auto& b = emulator::barrier_at(barrier);
    if (--b.left < 0) emulator::fail("more arrivals than the barrier was told of");
    emulator::end_phase_if_complete(b);
}
inline void barrier_arrive_expecting(uint32_t barrier, int bytes) {
    emulator::barrier_at(barrier).bytes += bytes;
    barrier_arrive(barrier);
}
inline void barrier_wait(uint32_t barrier, int parity) {
    auto& b = emulator::barrier_at(barrier);
    while (b.phase == parity) {
        if (b.left == 0) {
            for (const auto& copy : b.copies) {
                emulator::land(copy);
                b.bytes -= copy.bytes;
            }
            if (b.bytes < 0) emulator::fail("more bytes than the barrier was told of");
            b.copies.clear();
            emulator::end_phase_if_complete(b);
        }
        if (b.phase == parity) emulator::yield();
    }
}
inline void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    if (bytes % 16 != 0) emulator::fail("a bulk copy of " + std::to_string(bytes) + " bytes");
    auto& b = emulator::barrier_at(barrier);
    if (emulator::early) {
        emulator::land({to, from, bytes, bytes});
        b.bytes -= bytes;
        emulator::end_phase_if_complete(b);
    } else {
        b.copies.push_back({to, from, bytes, bytes});
    }
}
// Reads a byte: a buffer ends at an unreadable page.
inline void prefetch(const void* at) { static_cast<void>(*static_cast<const volatile char*>(at)); }
inline void prefetch_bulk(const void* from, int bytes) {
    if (bytes <= 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
        emulator::fail("a misaligned bulk prefetch");
    for (int i = 0; i < bytes; i += 16) prefetch(static_cast<const char*>(from) + i);
}
inline void publish_to_async() {}
inline void meet(int id, int threads) {
    emulator::meet(emulator::block->barriers[id], "bar.sync", emulator::block->barriers[id].arrived, threads, nullptr,
                   [](void**) {});
}
template <int Registers>
inline void take_registers() {}
template <int Registers>
inline void give_registers() {}

inline void products_begin() {}
inline void products_commit() {
    const int thread = threadIdx.x;
    emulator::groups[thread].push_back(std::move(emulator::open_group[thread]));
    emulator::open_group[thread].clear();
}
template <int Pending>
inline void products_wait() {
    const int thread = threadIdx.x;
    auto& mine = emulator::groups[thread];
    while (static_cast<int>(mine.size()) > Pending) {
        auto group = std::move(mine.front());
        mine.erase(mine.begin());
        for (auto& product : group) emulator::run_product(product);
    }
}
template <int Count>
inline void pin(float (&)[Count]) {}

template <Dtype D, int N>
inline void multiply_shared(float (&d)[N / 2], uint64_t a, uint64_t b) {
    emulator::open_group[threadIdx.x].push_back({d, nullptr, a, b, N, D == Dtype::bf16});
}
template <Dtype D, int N>
inline void multiply_wide(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
    emulator::open_group[threadIdx.x].push_back({d, a, 0, b, N, D == Dtype::bf16});
}

}  // namespace prunevit::mlp
