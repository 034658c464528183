#include "streams.h"

#include <algorithm>
#include <set>

// of Python, where the process has one: work is run by Python, and may have to wait for another thread of it
extern "C" {
__attribute__((weak)) int PyGILState_Check();
__attribute__((weak)) void* PyEval_SaveThread();
__attribute__((weak)) void PyEval_RestoreThread(void*);
__attribute__((weak)) int Py_IsInitialized();
}

Gpu gpu;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

namespace {

thread_local bool at_work = false;

struct WithoutPython {
    WithoutPython() {
        if (Py_IsInitialized != nullptr && Py_IsInitialized() && PyGILState_Check()) {
            state = PyEval_SaveThread();
        }
    }
    ~WithoutPython() {
        if (state != nullptr) {
            PyEval_RestoreThread(state);
        }
    }
    void* state = nullptr;
};

bool done(const Done& work) { return work == nullptr || work->done; }

}  // namespace

CUstream_st& Gpu::stream(cudaStream_t given) {
    const bool standard = given == nullptr || given == cudaStreamLegacy || given == cudaStreamPerThread;
    return standard ? default_stream : *given;
}

Done Gpu::make(std::vector<Done> after, std::function<cudaError_t()> run) {
    auto work = std::make_shared<Work>();
    for (Done& before : after) {
        if (!done(before)) {
            work->after.push_back(std::move(before));
        }
    }
    work->run = std::move(run);
    work->done = !work->run && work->after.empty();
    if (!work->done) {
        pending++;
        if (order >= 0) {
            waiting.push_back(work);
        }
    }
    return work;
}

Done Gpu::add(CUstream_st& stream, std::vector<Done> after, std::function<cudaError_t()> run) {
    if (stream.capture == nullptr) {
        after.push_back(stream.last);
        return stream.last = make(std::move(after), std::move(run));
    }
    auto node = std::make_shared<Work>();
    after.push_back(stream.captured);
    std::copy_if(after.begin(), after.end(), std::back_inserter(node->after),
                 [](const Done& d) { return d != nullptr; });
    node->run = std::move(run);
    stream.capture->graph->nodes.push_back(node);
    return stream.captured = node;
}

cudaError_t Gpu::enqueue(cudaStream_t given, std::function<cudaError_t()> run) {
    std::vector<Done> now;
    {
        std::lock_guard<std::mutex> guard(door);
        CUstream_st& on = stream(given);
        if (on.capture != nullptr && on.capture->broken) {
            return cudaErrorStreamCaptureInvalidated;
        }
        const Done work = add(on, {}, std::move(run));
        if (on.capture == nullptr && order == kEarly) {
            now.push_back(work);
        }
        if (order >= 0) {
            waiting.erase(std::remove_if(waiting.begin(), waiting.end(), done), waiting.end());
            for (int chosen = drawn() % 3; chosen > 0 && !waiting.empty(); chosen--) {
                now.push_back(waiting[drawn() % waiting.size()]);
            }
        }
    }
    for (const Done& work : now) {
        finish(work);
    }
    return failed;
}

cudaError_t Gpu::finish(const Done& target) {
    if (done(target)) {
        return failed;
    }
    if (at_work) {
        return cudaErrorNotPermitted;
    }
    WithoutPython without;
    std::lock_guard<std::mutex> alone(running);
    at_work = true;
    std::vector<Done> stack{target};
    while (!stack.empty()) {
        const Done work = stack.back();
        const auto before = std::find_if_not(work->after.begin(), work->after.end(), done);
        if (!work->done && before != work->after.end()) {
            stack.push_back(*before);
            continue;
        }
        stack.pop_back();
        if (!work->done) {
            if (work->run && failed == cudaSuccess) {
                const cudaError_t error = work->run();
                if (error != cudaSuccess) {
                    failed = error;
                }
            }
            work->run = nullptr;
            work->after.clear();
            work->done = true;
            pending--;
        }
    }
    at_work = false;
    return failed;
}

cudaError_t Gpu::finish_all() {
    std::vector<Done> ends;
    {
        std::lock_guard<std::mutex> guard(door);
        for (const CUstream_st* each : streams) {
            ends.push_back(each->last);
        }
    }
    for (const Done& end : ends) {
        finish(end);
    }
    return failed;
}

cudaError_t Gpu::record(cudaEvent_t event, cudaStream_t given) {
    std::lock_guard<std::mutex> guard(door);
    CUstream_st& on = stream(given);
    if (on.capture != nullptr) {
        event->capture = on.capture->id;
        event->work = on.captured;
        return cudaSuccess;
    }
    event->capture = 0;
    if (order == kEarly || done(on.last)) {
        *event->at = std::chrono::steady_clock::now();
        event->work = on.last;
        return failed;
    }
    auto at = event->at = std::make_shared<std::chrono::steady_clock::time_point>();
    event->work = add(on, {}, [at] { return *at = std::chrono::steady_clock::now(), cudaSuccess; });
    return failed;
}

cudaError_t Gpu::wait(cudaStream_t given, cudaEvent_t event) {
    std::lock_guard<std::mutex> guard(door);
    CUstream_st& on = stream(given);
    if (event->capture == 0) {
        if (on.capture != nullptr && event->work != nullptr) {
            on.capture->broken = true;
            return cudaErrorStreamCaptureIsolation;
        }
        if (!done(event->work)) {
            add(on, {event->work}, nullptr);
        }
        return failed;
    }
    const auto found = std::find_if(captures.begin(), captures.end(), [&](auto& c) { return c->id == event->capture; });
    if (found == captures.end()) {
        return cudaErrorInvalidValue;
    }
    if (on.capture == nullptr) {  // the capture takes this stream in
        on.capture = found->get();
        on.captured = nullptr;
        on.capture->streams.push_back(&on);
    } else if (on.capture != found->get()) {
        on.capture->broken = (*found)->broken = true;
        return cudaErrorStreamCaptureMerge;
    }
    add(on, {event->work}, nullptr);
    return cudaSuccess;
}

cudaError_t Gpu::begin_capture(cudaStream_t given, cudaStreamCaptureMode mode) {
    std::lock_guard<std::mutex> guard(door);
    CUstream_st& on = stream(given);
    if (&on == &default_stream) {
        return cudaErrorStreamCaptureUnsupported;
    }
    if (on.capture != nullptr) {
        return cudaErrorIllegalState;
    }
    captures.push_back(std::make_unique<Capture>());
    on.capture = captures.back().get();
    *on.capture = {mode, ++captures_so_far, std::this_thread::get_id(), new CUgraph_st, {&on}};
    on.captured = nullptr;
    return cudaSuccess;
}

cudaError_t Gpu::end_capture(cudaStream_t given, cudaGraph_t* graph) {
    std::lock_guard<std::mutex> guard(door);
    CUstream_st& on = stream(given);
    Capture* capture = on.capture;
    if (capture == nullptr || capture->streams.front() != &on) {
        return cudaErrorIllegalState;
    }
    cudaError_t result = capture->broken ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
    if (capture->mode != cudaStreamCaptureModeRelaxed && capture->by != std::this_thread::get_id()) {
        return capture->broken = true, cudaErrorStreamCaptureWrongThread;
    }
    std::set<Work*> joined;
    std::vector<Work*> stack{on.captured.get()};
    while (!stack.empty()) {
        Work* work = stack.back();
        stack.pop_back();
        if (work != nullptr && joined.insert(work).second) {
            for (const Done& before : work->after) {
                stack.push_back(before.get());
            }
        }
    }
    for (CUstream_st* each : capture->streams) {
        if (result == cudaSuccess && each->captured != nullptr && !joined.count(each->captured.get())) {
            result = cudaErrorStreamCaptureUnjoined;
        }
        each->capture = nullptr;
        each->captured = nullptr;
    }
    *graph = nullptr;
    if (result == cudaSuccess) {
        *graph = capture->graph;
    } else {
        delete capture->graph;
    }
    captures.erase(std::find_if(captures.begin(), captures.end(), [&](auto& c) { return c.get() == capture; }));
    return result;
}

cudaError_t Gpu::launch(cudaGraphExec_t graph, cudaStream_t given) {
    Done last;
    {
        std::lock_guard<std::mutex> guard(door);
        CUstream_st& on = stream(given);
        if (on.capture != nullptr && on.capture->broken) {
            return cudaErrorStreamCaptureInvalidated;
        }
        const bool capturing = on.capture != nullptr;
        std::vector<Done> ends;
        const Done before = add(on, {capturing ? nullptr : graph->last}, nullptr);
        std::vector<std::pair<Work*, Done>> made;
        for (const Done& node : graph->nodes) {
            std::vector<Done> after{before};
            for (const Done& other : node->after) {
                after.push_back(
                    std::find_if(made.begin(), made.end(), [&](auto& m) { return m.first == other.get(); })->second);
            }
            if (capturing) {
                auto copy = std::make_shared<Work>();
                copy->after = std::move(after);
                copy->run = node->run;
                on.capture->graph->nodes.push_back(copy);
                made.emplace_back(node.get(), copy);
            } else {
                made.emplace_back(node.get(), make(std::move(after), node->run));
            }
            ends.push_back(made.back().second);
        }
        last = add(on, ends, nullptr);
        if (capturing) {
            return cudaSuccess;
        }
        graph->last = last;
    }
    return order == kEarly ? finish(last) : cudaError_t(failed);
}

cudaError_t Gpu::unsafe() {
    std::lock_guard<std::mutex> guard(door);
    if (capture_mode == cudaStreamCaptureModeRelaxed) {
        return cudaSuccess;
    }
    cudaError_t result = cudaSuccess;
    for (const auto& capture : captures) {
        const bool own = capture->by == std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
        if (own || (capture_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal)) {
            capture->broken = true;
            result = cudaErrorStreamCaptureUnsupported;
        }
    }
    return result;
}

cudaError_t Gpu::waits(cudaStream_t given) {
    {
        std::lock_guard<std::mutex> guard(door);
        CUstream_st& on = stream(given);
        if (on.capture != nullptr) {
            return on.capture->broken = true, cudaErrorStreamCaptureUnsupported;
        }
    }
    return unsafe();
}
