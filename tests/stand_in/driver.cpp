// A stand-in for CUDA's driver, under the driver's name: what Triton calls of it.
#include <cuda.h>

#include <string>

#include "stand_in.h"
#include "streams.h"

struct CUmod_st {};
struct CUfunc_st {
    std::string name;
};

namespace {

CUresult as_driver(int error) { return static_cast<CUresult>(error); }  // the numbers are the same
CUctx_st* const kContext = reinterpret_cast<CUctx_st*>(&device);

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* out, int) { return *out = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
    return attribute(which, value) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuCtxGetCurrent(CUcontext* out) { return *out = kContext, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* out) { return *out = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* out, CUdevice) { return *out = kContext, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
    return *text = cudaGetErrorString(static_cast<cudaError_t>(error)), CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* out, const void*) {
    if (const cudaError_t refused = gpu.unsafe()) {
        return as_driver(refused);
    }
    return *out = new CUmod_st, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return delete module, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* out, CUmodule, const char* name) {
    return *out = new CUfunc_st{name}, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
    switch (which) {
        case CU_FUNC_ATTRIBUTE_NUM_REGS: return *value = 128, CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: return *value = 0, CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: return *value = 0, CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return *value = 1024, CUDA_SUCCESS;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute which, int value) {
    const bool fits = which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value <= device.shared_limit;
    return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
    const unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    const unsigned block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
    return as_driver(launch_kernel(function->name.c_str(), function, grid, block, arguments, config->sharedMemBytes,
                                   config->hStream));
}
CUresult cuPointerGetAttribute(void* out, CUpointer_attribute which, CUdeviceptr address) {
    size_t base, bytes;
    if (which != CU_POINTER_ATTRIBUTE_DEVICE_POINTER || !stand_in_allocation(address, &base, &bytes)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    return *static_cast<CUdeviceptr*>(out) = address, CUDA_SUCCESS;
}
CUresult cuStreamCreate(CUstream* out, unsigned flags) { return as_driver(cudaStreamCreateWithFlags(out, flags)); }
CUresult cuStreamDestroy(CUstream stream) { return as_driver(cudaStreamDestroy(stream)); }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
    cudaStreamCaptureStatus held;
    cudaStreamIsCapturing(stream, &held);
    return *status = static_cast<CUstreamCaptureStatus>(held), CUDA_SUCCESS;
}

// what Triton's driver names, and no kernel of ours asks for
CUresult cuCtxGetLimit(size_t*, CUlimit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuPointerGetAttributes(unsigned, CUpointer_attribute*, void**, CUdeviceptr) {
    return CUDA_ERROR_NOT_SUPPORTED;
}
}
