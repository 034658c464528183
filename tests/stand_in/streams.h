// What a GPU does with streams, events and graphs: work, and what must come before it.
//
// Nothing runs before somebody waits for it ("late": a wait that is missing shows), or everything at once ("early": so
// does a buffer that is needed for longer than it is kept), or in a drawn order. Whatever is allowed to happen may.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

using Work = CUgraphNode_st;  // a graph's nodes too: each launch of the graph makes new work of them

struct CUgraphNode_st {
    std::function<cudaError_t()> run;  // empty for a mark, which is done when what it waits for is
    std::vector<std::shared_ptr<Work>> after;
    std::atomic<bool> done{false};
};
using Done = std::shared_ptr<Work>;

struct CUgraph_st {
    std::vector<Done> nodes;  // each after what it waits for
};

struct Capture {
    cudaStreamCaptureMode mode;
    unsigned long long id;
    std::thread::id by;
    CUgraph_st* graph;
    std::vector<CUstream_st*> streams;  // the first is the one where it began
    bool broken = false;
};

struct CUstream_st {
    Done last;
    Capture* capture = nullptr;
    Done captured;  // the last node in the capture
    int priority = 0;
};

struct CUevent_st {
    Done work;
    unsigned long long capture = 0;  // the id of the capture that it was recorded in
    std::shared_ptr<std::chrono::steady_clock::time_point> at =
        std::make_shared<std::chrono::steady_clock::time_point>();
};

struct CUgraphExec_st {
    std::vector<Done> nodes;
    Done last;  // a graph does not run beside itself
};

enum Order { kLate = -1, kEarly = -2 };  // or a seed

struct Gpu {
    std::mutex door;  // of all that follows; not held while work runs
    int order = kLate;
    std::mt19937 drawn;
    CUstream_st default_stream;
    std::vector<CUstream_st*> streams{&default_stream};  // which live for as long as the process
    std::vector<Done> waiting;                           // of a drawn order
    std::vector<std::unique_ptr<Capture>> captures;
    unsigned long long captures_so_far = 0;
    std::atomic<int> pending{0};
    std::atomic<cudaError_t> failed{cudaSuccess};  // for good, as after an illegal address

    CUstream_st& stream(cudaStream_t given);

    // Put work on a stream, or into the capture that the stream is in.
    cudaError_t enqueue(cudaStream_t stream, std::function<cudaError_t()> run);
    // Run whatever must have run for this to be done. Without the door, and by no work.
    cudaError_t finish(const Done& target);
    cudaError_t finish_all();

    cudaError_t record(cudaEvent_t event, cudaStream_t stream);
    cudaError_t wait(cudaStream_t stream, cudaEvent_t event);

    cudaError_t begin_capture(cudaStream_t stream, cudaStreamCaptureMode mode);
    cudaError_t end_capture(cudaStream_t stream, cudaGraph_t* graph);
    cudaError_t launch(cudaGraphExec_t graph, cudaStream_t stream);
    // Whether this thread may call what is not safe while a stream is captured; where not, the capture is broken.
    cudaError_t unsafe();
    // The same for what waits for this stream.
    cudaError_t waits(cudaStream_t stream);

private:
    Done make(std::vector<Done> after, std::function<cudaError_t()> run);
    Done add(CUstream_st& stream, std::vector<Done> after, std::function<cudaError_t()> run);
    std::mutex running;
};

extern Gpu gpu;
extern thread_local cudaStreamCaptureMode capture_mode;
