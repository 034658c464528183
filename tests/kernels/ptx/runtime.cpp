// A stand-in for CUDA's runtime library, to link the extension's own objects with: every launch goes to a function
// that Python sets. Nothing of CUDA is needed to build it.
#include <cstddef>

#include "registered.h"

namespace {

struct Dim3 {
    unsigned x, y, z;
};

struct Config {  // cudaLaunchConfig_t
    Dim3 grid, block;
    size_t shared_bytes;
    void* stream;
    const int* attributes;  // of one, its kind comes first
    unsigned attribute_count;
};

struct Attributes {  // the beginning of cudaFuncAttributes
    size_t shared_bytes, constant_bytes, local_bytes;
    int most_threads, registers, ptx_version, binary_version;
};

using Launched = void (*)(const char* kernel, const unsigned* grid, unsigned threads, const void* arguments,
                          size_t shared_bytes);

Launched launched = nullptr;
int overlapping = 0;
int multiprocessors = 132, capability = 90, shared_limit = 227 * 1024;

constexpr int kSuccess = 0, kInvalidValue = 1, kNotReady = 600;
constexpr int kProgrammaticStreamSerialization = 6;  // cudaLaunchAttributeID
constexpr int kMaxSharedPerBlockOptin = 97, kMultiProcessorCount = 16, kMajor = 75, kMinor = 76;  // cudaDeviceAttr

}  // namespace

extern "C" {

void emulate_gpu(int sm, int count, int shared, Launched function) {
    capability = sm, multiprocessors = count, shared_limit = shared, launched = function;
}

// How many launches asked to begin before the one ahead of them has ended.
int overlapping_launches() { return overlapping; }

// what <<<>>> would call; the extension has none
int __cudaGetKernel(void**, const void*) { return kNotReady; }
int __cudaLaunchKernel(void*, Dim3, Dim3, void**, size_t, void*) { return kNotReady; }
int __cudaPopCallConfiguration(Dim3*, Dim3*, size_t*, void*) { return kNotReady; }

int cudaGetDevice(int* device) { return *device = 0, kSuccess; }
int cudaSetDevice(int) { return kSuccess; }
int cudaDeviceGetAttribute(int* value, int which, int) {
    switch (which) {
        case kMajor: *value = capability / 10; return kSuccess;
        case kMinor: *value = capability % 10; return kSuccess;
        case kMultiProcessorCount: *value = multiprocessors; return kSuccess;
        case kMaxSharedPerBlockOptin: *value = shared_limit; return kSuccess;
        default: return kInvalidValue;
    }
}
int cudaFuncSetAttribute(const void* kernel, int, int bytes) {
    const auto found = kernels().find(kernel);
    if (found == kernels().end() || bytes > shared_limit) {
        return kInvalidValue;
    }
    return found->second.shared_limit = bytes, kSuccess;
}
int cudaFuncGetAttributes(Attributes* found, const void* kernel) {
    if (kernels().count(kernel) == 0) {
        return kInvalidValue;
    }
    return found->ptx_version = compiled_for(capability), kSuccess;
}
int cudaLaunchKernelExC(const Config* config, const void* kernel, void** arguments) {
    const auto found = kernels().find(kernel);
    if (found == kernels().end() || launched == nullptr ||
        config->shared_bytes > static_cast<size_t>(found->second.shared_limit)) {
        return kInvalidValue;
    }
    if (config->attribute_count == 1 && config->attributes[0] == kProgrammaticStreamSerialization) {
        ++overlapping;
    } else if (config->attribute_count != 0) {
        return kInvalidValue;
    }
    const unsigned blocks[] = {config->grid.x, config->grid.y, config->grid.z};
    const unsigned threads = config->block.x * config->block.y * config->block.z;
    launched(found->second.name.c_str(), blocks, threads, arguments[0], config->shared_bytes);
    return kSuccess;
}
const char* cudaGetErrorName(int) { return "emulated"; }
const char* cudaGetErrorString(int) { return "an error of the stand-in for CUDA's runtime"; }
}
