#include "pool.h"

#include <pthread.h>
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace prunevit {
namespace {

struct alignas(64) Range {
    std::atomic<int> next{0};
    int end = 0;
};

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spin until `ready()` or until the time is up. Says whether it became ready.
template <class Ready>
bool spin(int microseconds, Ready ready) {
    if (ready()) return true;
    if (microseconds == 0) return false;
    const auto stop = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
    do {
        for (int i = 0; i < 16; ++i) {
            if (ready()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < stop);
    return false;
}

// Denormal numbers count as zero while this lives: they cost a hundred times a normal one and mean nothing here (what a
// sharp softmax leaves of a token that it does not look at).
class FlushDenormals {
public:
#if defined(__x86_64__)
    FlushDenormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040); }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }

private:
    unsigned saved_;
#elif defined(__aarch64__)
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" : : "r"(saved_ | uint64_t(1) << 24));
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

private:
    uint64_t saved_;
#else
    FlushDenormals() {}
    ~FlushDenormals() {}
#endif
};

}  // namespace

struct PoolState {
    explicit PoolState(int threads) : ranges(new Range[threads]) {}

    std::mutex busy;  // held by the calling thread
    std::vector<std::thread> workers;
    std::unique_ptr<Range[]> ranges;
    Body body = nullptr;
    const void* context = nullptr;
    bool stop = false;

    alignas(64) std::atomic<uint32_t> epoch{0};  // one more for every job
    alignas(64) std::atomic<int> pending{0};     // workers that have not finished the job
    // Sleepers register before they look at the epoch and the caller looks at them after it has changed the epoch, so
    // that one of the two always sees the other.
    std::atomic<int> sleepers{0};
    std::atomic<bool> caller_sleeps{false};
    std::mutex sleep;
    std::condition_variable job, done;
};

// Every live pool, so that a child after fork can give each a fresh state: its threads did not survive, and its locks
// are in whatever state they were.
namespace {
std::mutex registry_lock;
std::vector<Pool*>& registry() {
    static std::vector<Pool*>* pools = [] {
        pthread_atfork([] { registry_lock.lock(); }, [] { registry_lock.unlock(); },
                       [] {
                           for (Pool* pool : registry()) pool->replace_state_after_fork();
                           registry_lock.unlock();
                       });
        return new std::vector<Pool*>;
    }();
    return *pools;
}
}  // namespace

Pool::Pool(int threads, int spin_us) : threads_(threads), spin_us_(spin_us), state_(new PoolState(threads)) {
    std::vector<Pool*>& pools = registry();
    std::lock_guard<std::mutex> guard(registry_lock);
    pools.push_back(this);
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> guard(registry_lock);
        for (Pool*& pool : registry())
            if (pool == this) {
                pool = registry().back();
                registry().pop_back();
                break;
            }
    }
    {
        std::lock_guard<std::mutex> guard(state_->sleep);
        state_->stop = true;
        state_->epoch.fetch_add(1);
        state_->job.notify_all();
    }
    for (std::thread& worker : state_->workers) worker.join();
    delete state_;
    free_floats(scratch_);
    free_floats(shared_);
}

void Pool::replace_state_after_fork() {
    state_ = new PoolState(threads_);  // the old one is leaked: its threads cannot be joined here
}

void Pool::lock() { state_->busy.lock(); }
void Pool::unlock() { state_->busy.unlock(); }

void Pool::reserve(int64_t each, int64_t shared) {
    each = (each + 15) / 16 * 16;
    if (each <= scratch_floats_ && shared <= shared_floats_) return;
    std::lock_guard<std::mutex> guard(state_->busy);
    // freed last: a child that another thread forks in between has what the pointers say
    if (each > scratch_floats_) {
        float* old = std::exchange(scratch_, allocate_floats(each * threads_));
        scratch_floats_ = each;
        free_floats(old);
    }
    if (shared > shared_floats_) {
        float* old = std::exchange(shared_, allocate_floats(shared));
        shared_floats_ = shared;
        free_floats(old);
    }
}

// Those that are missing: an attempt before may have come to a limit on threads.
void Pool::start_workers(PoolState& state) {
    for (int thread = static_cast<int>(state.workers.size()) + 1; thread < threads_; ++thread) try {
            state.workers.emplace_back(&Pool::worker_main, this, &state, thread);
        } catch (const std::system_error& error) {
            throw std::runtime_error("expected to run on " + std::to_string(threads_) + " threads, got " +
                                     std::to_string(thread) + ": " + error.what());
        }
}

void Pool::work(PoolState& state, int thread) {
    const FlushDenormals flush;
    float* scratch = scratch_ + thread * scratch_floats_;
    for (int i = 0; i < threads_; ++i) {
        Range& range = state.ranges[(thread + i) % threads_];
        for (;;) {
            const int item = range.next.fetch_add(1, std::memory_order_relaxed);
            if (item >= range.end) break;
            state.body(state.context, item, scratch);
        }
    }
}

void Pool::worker_main(PoolState* state, int thread) {
    uint32_t seen = 0;
    for (;;) {
        if (!spin(spin_us_, [&] { return state->epoch.load(std::memory_order_acquire) != seen; })) {
            std::unique_lock<std::mutex> guard(state->sleep);
            state->sleepers.fetch_add(1);
            state->job.wait(guard, [&] { return state->epoch.load() != seen; });
            state->sleepers.fetch_sub(1);
        }
        ++seen;
        if (state->stop) return;
        work(*state, thread);
        if (state->pending.fetch_sub(1) == 1 && state->caller_sleeps.load()) {
            std::lock_guard<std::mutex> guard(state->sleep);
            state->done.notify_one();
        }
    }
}

void Pool::run(int items, Body body, const void* context) {
    PoolState& state = *state_;
    if (threads_ == 1 || items == 1) {
        const FlushDenormals flush;
        for (int item = 0; item < items; ++item) body(context, item, scratch_);
        return;
    }
    if (static_cast<int>(state.workers.size()) + 1 < threads_) start_workers(state);
    state.body = body;
    state.context = context;
    for (int t = 0; t < threads_; ++t) {
        state.ranges[t].next.store(static_cast<int>(int64_t(items) * t / threads_), std::memory_order_relaxed);
        state.ranges[t].end = static_cast<int>(int64_t(items) * (t + 1) / threads_);
    }
    state.pending.store(threads_ - 1, std::memory_order_relaxed);
    state.epoch.fetch_add(1);
    if (state.sleepers.load() > 0) {
        std::lock_guard<std::mutex> guard(state.sleep);
        state.job.notify_all();
    }
    work(state, 0);
    if (!spin(spin_us_, [&] { return state.pending.load(std::memory_order_acquire) == 0; })) {
        std::unique_lock<std::mutex> guard(state.sleep);
        state.caller_sleeps.store(true);
        state.done.wait(guard, [&] { return state.pending.load() == 0; });
        state.caller_sleeps.store(false);
    }
}

float* allocate_floats(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 127) / 64 * 64;
    void* data = nullptr;
    if (posix_memalign(&data, 64, bytes) != 0) throw std::bad_alloc();
    return static_cast<float*>(data);
}

void free_floats(float* data) { free(data); }

}  // namespace prunevit
