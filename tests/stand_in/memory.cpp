// Memory of the stand-in: the host's, in allocations that lie apart, full of NaN.
#include <sys/mman.h>

#include <cstring>
#include <map>

#include "stand_in.h"
#include "streams.h"

namespace {

constexpr size_t kPage = 4096, kTotal = size_t{16} << 30;

std::mutex door;
std::map<size_t, size_t> allocations;  // base to bytes
std::map<const void*, size_t> pinned;
std::vector<std::pair<void*, size_t>> freed;  // until no work is left that could use it
size_t used = 0;

size_t room(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage + 2 * kPage; }

bool on_device(const void* address) {
    size_t base, bytes;
    return stand_in_allocation(reinterpret_cast<size_t>(address), &base, &bytes);
}

bool is_pinned(const void* address) {
    std::lock_guard<std::mutex> guard(door);
    auto found = pinned.upper_bound(address);
    return found != pinned.begin() &&
           (--found, static_cast<const char*>(address) - static_cast<const char*>(found->first) <
                         static_cast<ptrdiff_t>(found->second));
}

cudaError_t host_alloc(void** out, size_t bytes) {
    *out = aligned_alloc(kPage, room(bytes));
    std::lock_guard<std::mutex> guard(door);
    pinned[*out] = bytes;
    return cudaSuccess;
}

cudaError_t copied(void* to, const void* from, size_t bytes) { return std::memmove(to, from, bytes), cudaSuccess; }

}  // namespace

extern "C" {

int stand_in_allocation(size_t address, size_t* base, size_t* bytes) {
    std::lock_guard<std::mutex> guard(door);
    auto found = allocations.upper_bound(address);
    if (found == allocations.begin() || address - (--found)->first >= found->second) {
        return 0;
    }
    return *base = found->first, *bytes = found->second, 1;
}

cudaError_t cudaMalloc(void** out, size_t bytes) {
    if (const cudaError_t refused = gpu.unsafe()) {
        return refused;
    }
    std::lock_guard<std::mutex> guard(door);
    if (gpu.pending == 0) {
        for (const auto& [base, size] : freed) {
            munmap(base, size);
        }
        freed.clear();
    }
    *out = nullptr;
    if (bytes == 0) {
        return cudaSuccess;
    }
    if (used + bytes > kTotal) {
        return cudaErrorMemoryAllocation;
    }
    // a page without access on either side
    void* mapped = mmap(nullptr, room(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) {
        return cudaErrorMemoryAllocation;
    }
    char* base = static_cast<char*>(mapped) + kPage;
    mprotect(base, room(bytes) - 2 * kPage, PROT_READ | PROT_WRITE);
    std::memset(base, 0xFF, bytes);
    allocations[reinterpret_cast<size_t>(base)] = bytes;
    used += bytes;
    *out = base;
    return cudaSuccess;
}

cudaError_t cudaFree(void* base) {
    if (base == nullptr) {
        return cudaSuccess;
    }
    if (const cudaError_t refused = gpu.unsafe()) {
        return refused;
    }
    std::lock_guard<std::mutex> guard(door);
    const auto found = allocations.find(reinterpret_cast<size_t>(base));
    if (found == allocations.end()) {
        return cudaErrorInvalidValue;
    }
    freed.emplace_back(static_cast<char*>(base) - kPage, room(found->second));
    used -= found->second;
    allocations.erase(found);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
    std::lock_guard<std::mutex> guard(door);
    return *left = kTotal - used, *total = kTotal, cudaSuccess;
}

cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) { return host_alloc(out, bytes); }
cudaError_t cudaMallocHost(void** out, size_t bytes) { return host_alloc(out, bytes); }
cudaError_t cudaFreeHost(void* base) {
    std::lock_guard<std::mutex> guard(door);
    return pinned.erase(base), free(base), cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* address) {
    *out = {};
    out->type = on_device(address)   ? cudaMemoryTypeDevice
                : is_pinned(address) ? cudaMemoryTypeHost
                                     : cudaMemoryTypeUnregistered;
    out->devicePointer = out->type == cudaMemoryTypeUnregistered ? nullptr : const_cast<void*>(address);
    out->hostPointer = out->type == cudaMemoryTypeDevice ? nullptr : const_cast<void*>(address);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    const auto later = [](const void* address) { return on_device(address) || is_pinned(address); };
    if (later(to) && later(from)) {
        return gpu.enqueue(stream, [=] { return copied(to, from, bytes); });
    }
    if (later(to)) {  // what is on pageable memory now
        auto held =
            std::make_shared<std::vector<char>>(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
        return gpu.enqueue(stream, [=] { return copied(to, held->data(), bytes); });
    }
    if (const cudaError_t refused = cudaStreamSynchronize(stream)) {
        return refused;
    }
    return copied(to, from, bytes);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    if (const cudaError_t refused = cudaMemcpyAsync(to, from, bytes, kind, nullptr)) {
        return refused;
    }
    return cudaStreamSynchronize(nullptr);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    return gpu.enqueue(stream, [=] { return std::memset(to, value, bytes), cudaSuccess; });
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }
}
