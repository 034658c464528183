// The launches, one function a kernel family. Each instantiation set is a translation unit of its own, so that they
// compile in parallel.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "plan.h"

namespace prunevit::mlp {

inline void check(cudaError_t status, const char* call, const Plan& plan, const Shape& shape) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string("fused_mlp kernel '") + name_of(plan.kernel) + "', " + describe(shape) + ": " +
                             call + " failed: " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

// One launch waiting for its arguments and its stream.
struct Launch {
    const void* kernel;
    dim3 grid;
    int threads;
    int shared;
};

// The attribute is the function's, not the launch's: were it set to what this launch takes, a smaller shape bound later
// would lower it for this one.
inline void prepare(const Launch& launch, int shared_limit, const Plan& plan, const Shape& shape) {
    check(cudaFuncSetAttribute(launch.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit),
          "cudaFuncSetAttribute", plan, shape);
}

// A launch that may begin early has to wait itself, and what was compiled for GPUs older than sm_90 does not, though
// newer ones run it too: as it is (sm_80 on sm_86), or compiled by the driver.
inline void expect_waiting(const Launch& launch, const Plan& plan, const Shape& shape) {
    cudaFuncAttributes code{};
    check(cudaFuncGetAttributes(&code, launch.kernel), "cudaFuncGetAttributes", plan, shape);
    if (code.ptxVersion < 90) {
        throw std::runtime_error(std::string("fused_mlp kernel '") + name_of(plan.kernel) +
                                 "': expected machine code for sm_90 or newer where launches overlap, got compute_" +
                                 std::to_string(code.ptxVersion) +
                                 "; build with PRUNEVIT_CUDA_ARCHS set to this GPU, or unset PRUNEVIT_PDL");
    }
}

// `overlaps`: it may begin before the launch ahead of it has ended (programmatic dependent launch).
inline void start(const Launch& launch, const Arguments& arguments, const Plan& plan, bool overlaps,
                  cudaStream_t stream) {
    void* given[] = {const_cast<Arguments*>(&arguments)};
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = launch.grid;
    config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = launch.shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = overlaps ? 1 : 0;
    check(cudaLaunchKernelExC(&config, launch.kernel, given), "cudaLaunchKernelExC", plan, arguments.shape);
}

Launch fused_launch(Dtype dtype, const Shape& shape, const Plan& plan);
Launch reduce_launch(Dtype dtype, const Shape& shape);
Launch expand_launch(Dtype dtype, const Shape& shape, const Plan& plan);
Launch contract_launch(Dtype dtype, const Shape& shape, const Plan& plan);
// built for sm_90a alone
Launch wgmma_launch(Dtype dtype, const Shape& shape, const Plan& plan);
Launch wgmma_expand_launch(Dtype dtype, const Shape& shape, const Plan& plan);
Launch wgmma_contract_launch(Dtype dtype, const Shape& shape, const Plan& plan);

}  // namespace prunevit::mlp
