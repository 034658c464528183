#include "two_gemms.cuh"

#include "launch.h"

namespace prunevit::mlp {

Launch expand_launch(Dtype dtype, const Shape& shape, const Plan& plan) {
    const bool tall = plan.expand_mt == 3, bf16 = dtype == Dtype::bf16;
    const void* kernel = tall ? (bf16 ? reinterpret_cast<const void*>(&expand<Dtype::bf16, 3>)
                                      : reinterpret_cast<const void*>(&expand<Dtype::fp16, 3>))
                              : (bf16 ? reinterpret_cast<const void*>(&expand<Dtype::bf16, 2>)
                                      : reinterpret_cast<const void*>(&expand<Dtype::fp16, 2>));
    return {kernel, dim3(ceil_div(shape.rows, 32 * plan.expand_mt), plan.expand_columns), kThreads,
            gemm_shared_bytes(32 * plan.expand_mt)};
}

Launch contract_launch(Dtype dtype, const Shape& shape, const Plan& plan) {
    const bool tall = plan.mt == 4, bf16 = dtype == Dtype::bf16;
    const void* kernel = tall ? (bf16 ? reinterpret_cast<const void*>(&contract<Dtype::bf16, 4>)
                                      : reinterpret_cast<const void*>(&contract<Dtype::fp16, 4>))
                              : (bf16 ? reinterpret_cast<const void*>(&contract<Dtype::bf16, 2>)
                                      : reinterpret_cast<const void*>(&contract<Dtype::fp16, 2>));
    const dim3 grid(ceil_div(shape.rows, 32 * plan.mt) * ceil_div(shape.out, kGemmColumns), plan.splits);
    return {kernel, grid, kThreads, plan.shared};
}

}  // namespace prunevit::mlp
