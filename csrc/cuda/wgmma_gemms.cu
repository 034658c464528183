#include "wgmma_gemms.cuh"

#include "launch.h"

namespace prunevit::mlp {
namespace {

template <Dtype D>
const void* contract_instance(int columns) {
    switch (columns) {
        case 64: return reinterpret_cast<const void*>(&wgmma_contract<D, 64>);
        case 128: return reinterpret_cast<const void*>(&wgmma_contract<D, 128>);
        case 160: return reinterpret_cast<const void*>(&wgmma_contract<D, 160>);
        case 176: return reinterpret_cast<const void*>(&wgmma_contract<D, 176>);
        case 192: return reinterpret_cast<const void*>(&wgmma_contract<D, 192>);
        default: throw std::logic_error("wgmma_contract has no instance of " + std::to_string(columns) + " columns");
    }
}

}  // namespace

Launch wgmma_expand_launch(Dtype dtype, const Shape& shape, const Plan& plan) {
    const void* kernel = dtype == Dtype::bf16 ? reinterpret_cast<const void*>(&wgmma_expand<Dtype::bf16>)
                                              : reinterpret_cast<const void*>(&wgmma_expand<Dtype::fp16>);
    return {kernel, dim3(row_tiles(shape), plan.expand_columns), kWgmmaThreads, expand_shared(shape, plan.slots).bytes};
}

Launch wgmma_contract_launch(Dtype dtype, const Shape& shape, const Plan& plan) {
    const void* kernel =
        dtype == Dtype::bf16 ? contract_instance<Dtype::bf16>(plan.nu) : contract_instance<Dtype::fp16>(plan.nu);
    const dim3 grid(ceil_div(shape.rows, kContractRows) * ceil_div(shape.out, plan.nu), plan.splits);
    return {kernel, grid, kWgmmaThreads, contract_shared_bytes(plan.nu)};
}

}  // namespace prunevit::mlp
