// A small thread pool. Workers spin briefly for the next job, then sleep; the calling thread works too.
#pragma once
#include <stdint.h>

#include <atomic>

namespace prunevit {

// One job's body: called once for every item, on any thread, with that thread's scratch.
using Body = void (*)(const void* context, int item, float* scratch);

struct PoolState;

// Usable from several threads (they take turns), and in a child after fork, which starts threads of its own.
class Pool {
public:
    Pool(int threads, int spin_us);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }
    // Grow the scratch, in floats: so much for every thread, so much shared by all. Waits for a running job only if so.
    void reserve(int64_t each, int64_t shared);
    void lock();
    void unlock();

    // Between lock and unlock only. Thread t begins with the t-th part of the items and then takes what others left.
    void run(int items, Body body, const void* context);
    float* shared() const { return shared_; }

    void replace_state_after_fork();

private:
    void start_workers(PoolState& state);
    void work(PoolState& state, int thread);
    void worker_main(PoolState* state, int thread);

    const int threads_;
    const int spin_us_;
    PoolState* state_;
    std::atomic<int64_t> scratch_floats_{0}, shared_floats_{0};
    float* scratch_ = nullptr;  // threads_ slices of scratch_floats_
    float* shared_ = nullptr;
};

// Memory on a boundary of 64 bytes. Throws std::bad_alloc.
float* allocate_floats(int64_t count);
void free_floats(float* data);

}  // namespace prunevit
