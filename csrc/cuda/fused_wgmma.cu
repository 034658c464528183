#include "fused_wgmma.cuh"

#include "launch.h"

namespace prunevit::mlp {
namespace {

template <Dtype D>
const void* instance(int columns) {
    switch (columns) {
        case 160: return reinterpret_cast<const void*>(&fused_wgmma<D, 160>);
        case 192: return reinterpret_cast<const void*>(&fused_wgmma<D, 192>);
        case 320: return reinterpret_cast<const void*>(&fused_wgmma<D, 320>);
        case 352: return reinterpret_cast<const void*>(&fused_wgmma<D, 352>);
        case 384: return reinterpret_cast<const void*>(&fused_wgmma<D, 384>);
        default: throw std::logic_error("fused_wgmma has no instance of " + std::to_string(columns) + " columns");
    }
}

}  // namespace

Launch wgmma_launch(Dtype dtype, const Shape& shape, const Plan& plan) {
    const void* kernel = dtype == Dtype::bf16 ? instance<Dtype::bf16>(plan.nu) : instance<Dtype::fp16>(plan.nu);
    return {kernel, dim3(plan.blocks), kWgmmaThreads, plan.shared};
}

}  // namespace prunevit::mlp
