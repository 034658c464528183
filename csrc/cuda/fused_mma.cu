#include "fused_mma.cuh"

#include "launch.h"

namespace prunevit::mlp {
namespace {

template <Dtype D>
const void* instance(const Plan& plan) {
    if (plan.mt == 4 && plan.nu == 3) return reinterpret_cast<const void*>(&fused_mma<D, 4, 3>);
    if (plan.mt == 2 && plan.nu == 3) return reinterpret_cast<const void*>(&fused_mma<D, 2, 3>);
    if (plan.mt == 2 && plan.nu == 6) return reinterpret_cast<const void*>(&fused_mma<D, 2, 6>);
    if (plan.mt == 2 && plan.nu == 8) return reinterpret_cast<const void*>(&fused_mma<D, 2, 8>);
    if (plan.mt == 1 && plan.nu == 8) return reinterpret_cast<const void*>(&fused_mma<D, 1, 8>);
    throw std::logic_error("fused_mma has no instance of mt " + std::to_string(plan.mt) + ", nu " +
                           std::to_string(plan.nu));
}

}  // namespace

Launch fused_launch(Dtype dtype, const Shape& shape, const Plan& plan) {
    const void* kernel = dtype == Dtype::bf16 ? instance<Dtype::bf16>(plan) : instance<Dtype::fp16>(plan);
    return {kernel, dim3(ceil_div(shape.rows, 32 * plan.mt), plan.splits), kThreads, plan.shared};
}

Launch reduce_launch(Dtype dtype, const Shape& shape) {
    const void* kernel = dtype == Dtype::bf16 ? reinterpret_cast<const void*>(&reduce_splits<Dtype::bf16>)
                                              : reinterpret_cast<const void*>(&reduce_splits<Dtype::fp16>);
    const int64_t pieces = int64_t{shape.rows} * shape.out_padded() / 8;
    return {kernel, dim3(static_cast<unsigned>((pieces + kThreads - 1) / kThreads)), kThreads, 0};
}

}  // namespace prunevit::mlp
