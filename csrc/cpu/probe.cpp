// The machine's own peaks, measured: what a benchmark's figures are fractions of.
#include <algorithm>
#include <chrono>

#include "bound.h"

namespace prunevit {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

double fma_peak(int threads, double milliseconds) {
    require(threads >= 1 && milliseconds > 0, "at least one thread and some time",
            std::to_string(threads) + " and " + std::to_string(milliseconds) + " ms");
    const Kernels& isa = kernels();
    Pool pool(threads, 50);
    Session session(pool);
    const Body body = [](const void* context, int, float*) {
        kernels().fma_seconds(*static_cast<const int64_t*>(context));
    };
    int64_t rounds = 1000;
    const double once = isa.fma_seconds(rounds);
    rounds = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(rounds) * milliseconds * 1e-3 / once));
    pool.run(threads, body, &rounds);  // starts the threads
    const Clock::time_point start = Clock::now();
    pool.run(threads, body, &rounds);
    return isa.fma_flops * static_cast<double>(rounds) * threads / seconds_since(start);
}

double read_bandwidth(int threads, int64_t bytes, double milliseconds) {
    struct Work {
        const float* data;
        int64_t each;  // floats
    };
    require(threads >= 1, "at least one thread", std::to_string(threads));
    Pool pool(threads, 50);
    Session session(pool);
    const int64_t each = bytes / 4 / threads / 64 * 64;
    require(each > 0, "at least 256 bytes a thread", std::to_string(bytes));
    const std::unique_ptr<float[], void (*)(float*)> data(allocate_floats(each * threads), free_floats);
    std::fill(data.get(), data.get() + each * threads, 1.0f);
    const Work work = {data.get(), each};
    const Body body = [](const void* context, int item, float*) {
        const Work& w = *static_cast<const Work*>(context);
        typedef float v4 __attribute__((vector_size(16)));
        const v4* p = reinterpret_cast<const v4*>(w.data + item * w.each);
        v4 sums[8] = {};
        for (int64_t i = 0; i < w.each / 4; i += 8)
            for (int j = 0; j < 8; ++j) sums[j] += p[i + j];
        asm volatile("" : : "m"(sums));
    };
    pool.run(threads, body, &work);
    const Clock::time_point start = Clock::now();
    int64_t runs = 0;
    do {
        pool.run(threads, body, &work);
        ++runs;
    } while (seconds_since(start) < milliseconds * 1e-3);
    return static_cast<double>(each) * 4 * threads * static_cast<double>(runs) / seconds_since(start);
}

}  // namespace prunevit
