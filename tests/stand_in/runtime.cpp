// A stand-in for CUDA's runtime library, loaded before it: what PyTorch and the extension call of it.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "../kernels/ptx/registered.h"
#include "stand_in.h"
#include "streams.h"

Device device;

namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local dim3 configured_grid, configured_block;
thread_local size_t configured_shared;
thread_local void* configured_stream;

}  // namespace

bool attribute(int which, int* value) {
    switch (which) {
        case cudaDevAttrMaxThreadsPerBlock: return *value = 1024, true;
        case cudaDevAttrMaxSharedMemoryPerBlock: return *value = 48 * 1024, true;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return *value = device.shared_limit, true;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return *value = device.shared_limit + 1024, true;
        case cudaDevAttrWarpSize: return *value = 32, true;
        case cudaDevAttrMaxRegistersPerBlock: return *value = 65536, true;
        case cudaDevAttrMultiProcessorCount: return *value = device.multiprocessors, true;
        case cudaDevAttrComputeCapabilityMajor: return *value = device.sm / 10, true;
        case cudaDevAttrComputeCapabilityMinor: return *value = device.sm % 10, true;
        case cudaDevAttrGlobalMemoryBusWidth: return *value = 5120, true;
        case cudaDevAttrL2CacheSize: return *value = 50 << 20, true;
        case cudaDevAttrClockRate:
        case cudaDevAttrMemoryClockRate: return *value = 1, true;
        default: return false;
    }
}

int launch_kernel(const char* kernel, const void* function, const unsigned* grid, const unsigned* block,
                  void* const* arguments, size_t shared_bytes, void* stream) {
    const unsigned threads = block[0] * block[1] * block[2];
    const bool fits = grid[0] * grid[1] * grid[2] > 0 && grid[1] < 65536 && grid[2] < 65536 && threads > 0 &&
                      threads <= 1024 && shared_bytes <= static_cast<size_t>(device.shared_limit);
    if (!fits || device.launched == nullptr) {
        return cudaErrorInvalidConfiguration;
    }
    const int work = device.launched(kernel, function, grid, threads, arguments, shared_bytes);
    return work < 0 ? cudaErrorInvalidDeviceFunction : stand_in_enqueue(stream, work);
}

extern "C" {

void stand_in_be(int sm, int multiprocessors, int shared_limit, int order, Launched launched, Run run) {
    device = {sm, multiprocessors, shared_limit, launched, run};
    gpu.order = order;
    gpu.drawn.seed(order);
}

int stand_in_enqueue(void* stream, int work) {
    return gpu.enqueue(static_cast<cudaStream_t>(stream),
                       [work] { return device.run(work) ? cudaSuccess : cudaErrorIllegalAddress; });
}

void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    configured_grid = grid, configured_block = block, configured_shared = shared, configured_stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configured_grid, *block = configured_block, *shared = configured_shared;
    *static_cast<void**>(stream) = configured_stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    return *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host)), cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t stream) {
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, args, shared, stream);
}

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream) {
    const auto found = kernels().find(host);
    if (found == kernels().end()) {
        return last_error = cudaErrorInvalidDeviceFunction;
    }
    const unsigned blocks[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
    if (shared > static_cast<size_t>(found->second.shared_limit)) {
        return last_error = cudaErrorInvalidValue;
    }
    return last_error = static_cast<cudaError_t>(
               launch_kernel(found->second.name.c_str(), nullptr, blocks, threads, args, shared, stream));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** args) {
    return cudaLaunchKernel(host, config->gridDim, config->blockDim, args, config->dynamicSmemBytes, config->stream);
}
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute which, int value) {
    const auto found = kernels().find(host);
    if (found == kernels().end() || which != cudaFuncAttributeMaxDynamicSharedMemorySize ||
        value > device.shared_limit) {
        return cudaErrorInvalidValue;
    }
    return found->second.shared_limit = value, cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void* host) {
    if (kernels().count(host) == 0) {
        return cudaErrorInvalidDeviceFunction;
    }
    return found->ptxVersion = found->binaryVersion = compiled_for(device.sm), cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* current) { return *current = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int which) { return which == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    return attribute(which, value) ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaDeviceGetPCIBusId(char* out, int length, int) {
    return std::snprintf(out, length, "0000:00:00.0"), cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int) {
    std::memset(out, 0, sizeof *out);
    std::snprintf(out->name, sizeof out->name, "stand-in for sm_%d", device.sm);
    size_t left;
    cudaMemGetInfo(&left, &out->totalGlobalMem);
    out->major = device.sm / 10, out->minor = device.sm % 10;
    out->multiProcessorCount = device.multiprocessors;
    out->sharedMemPerBlock = 48 * 1024;
    out->sharedMemPerBlockOptin = device.shared_limit;
    out->sharedMemPerMultiprocessor = device.shared_limit + 1024;
    out->regsPerBlock = out->regsPerMultiprocessor = 65536;
    out->warpSize = 32, out->maxThreadsPerBlock = 1024, out->maxThreadsPerMultiProcessor = 2048;
    out->l2CacheSize = 50 << 20, out->memoryBusWidth = 5120;
    out->unifiedAddressing = out->concurrentKernels = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
    *found = dlsym(RTLD_DEFAULT, name);
    if (status != nullptr) {
        *status = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    }
    return *found ? cudaSuccess : cudaErrorSymbolNotFound;
}
cudaError_t cudaGetLastError() {
    const cudaError_t error = gpu.failed != cudaSuccess ? gpu.failed.load() : last_error;
    return last_error = cudaSuccess, error;
}
cudaError_t cudaPeekAtLastError() { return gpu.failed != cudaSuccess ? gpu.failed.load() : last_error; }
cudaError_t cudaDeviceSynchronize() {
    const cudaError_t refused = gpu.unsafe();
    return refused ? refused : gpu.finish_all();
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int priority) {
    std::lock_guard<std::mutex> guard(gpu.door);
    gpu.streams.push_back(*out = new CUstream_st);
    (*out)->priority = priority;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
    return cudaStreamCreateWithPriority(out, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* out) { return cudaStreamCreateWithPriority(out, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* out) {
    return *out = gpu.stream(stream).priority, cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (const cudaError_t refused = gpu.waits(stream)) {
        return refused;
    }
    std::lock_guard<std::mutex> guard(gpu.door);
    const Done& last = gpu.stream(stream).last;
    return last == nullptr || last->done ? gpu.failed.load() : cudaErrorNotReady;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (const cudaError_t refused = gpu.waits(stream)) {
        return refused;
    }
    Done last;
    {
        std::lock_guard<std::mutex> guard(gpu.door);
        last = gpu.stream(stream).last;
    }
    return gpu.finish(last);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) { return gpu.wait(stream, event); }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    return gpu.enqueue(stream, [=] { return function(data), cudaSuccess; });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) { return *out = new CUevent_st, cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return gpu.record(event, stream);
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return gpu.record(event, stream); }
cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (const cudaError_t refused = gpu.unsafe()) {
        return refused;
    }
    std::lock_guard<std::mutex> guard(gpu.door);
    if (event->capture != 0) {
        return cudaErrorCapturedEvent;
    }
    return event->work == nullptr || event->work->done ? gpu.failed.load() : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (const cudaError_t refused = gpu.unsafe()) {
        return refused;
    }
    if (event->capture != 0) {
        return cudaErrorCapturedEvent;
    }
    return gpu.finish(event->work);
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = std::chrono::duration<float, std::milli>(*end->at - *start->at).count();
    return gpu.failed;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    return std::swap(*mode, capture_mode), cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    return gpu.begin_capture(stream, mode);
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) { return gpu.end_capture(stream, graph); }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
    std::lock_guard<std::mutex> guard(gpu.door);
    const Capture* capture = gpu.stream(stream).capture;
    *status = capture == nullptr ? cudaStreamCaptureStatusNone
              : capture->broken  ? cudaStreamCaptureStatusInvalidated
                                 : cudaStreamCaptureStatusActive;
    static thread_local cudaGraphNode_t before;  // what the next one would wait for
    before = gpu.stream(stream).captured.get();
    if (nodes != nullptr) {
        *nodes = &before;
    }
    if (edges != nullptr) {
        *edges = nullptr;
    }
    if (count != nullptr) {
        *count = before != nullptr;
    }
    if (capture != nullptr && id != nullptr) {
        *id = capture->id;
    }
    if (capture != nullptr && graph != nullptr) {
        *graph = capture->graph;
    }
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
    return *count = graph->nodes.size(), nodes == nullptr ? cudaSuccess : cudaErrorNotSupported;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t* before, cudaGraphEdgeData* edges,
                                         size_t* count) {
    const size_t room = before == nullptr ? 0 : *count;
    *count = node->after.size();
    for (size_t i = 0; i < std::min(room, *count); i++) {
        before[i] = node->after[i].get();
        if (edges != nullptr) {
            edges[i] = {};
        }
    }
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
    return *out = new CUgraphExec_st{graph->nodes, nullptr}, cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiate(out, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) { return gpu.launch(graph, stream); }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete graph, cudaSuccess; }
}
