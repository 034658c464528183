// x ← x + γ (c Wᵀ + b)
#include "gemm.h"

namespace prunevit {
namespace PRUNEVIT_ISA {
namespace {

struct LinearResidualStep final : Step {
    explicit LinearResidualStep(const LinearResidual& op) : op(op) {}

    Need need(int threads) const override {
        const int64_t rows = few_rows(op.x.rows, threads) ? op.x.rows : block_rows(row_blocks(op.x.rows, threads));
        return {rows * widest, 0};
    }

    void run(Pool& pool) const override {
        const bool few = few_rows(op.x.rows, pool.threads());
        const RowBlocks blocks = few ? RowBlocks{op.x.rows, 1} : row_blocks(op.x.rows, pool.threads());
        const int groups = few ? op.linear->panels : 1;
        each(pool, blocks.count * groups, [&](int item, float* scratch) {
            const int block = item / groups, p = item % groups;
            const int64_t first = block_start(blocks, block), last = block_start(blocks, block + 1);
            const float* c = op.c.data + first * op.c.pitch;
            float* x = op.x.data + first * op.x.pitch;
            for (int i = p; i < (few ? p + 1 : op.linear->panels); ++i)
                linear_panel(*op.linear, i, c, op.c.pitch, (int)(last - first), Into::residual,
                             residual_start(*op.linear, i, x), op.x.pitch, scratch);
        });
    }

    const LinearResidual op;
};

}  // namespace

Step* linear_residual(const LinearResidual& op) { return new LinearResidualStep(op); }

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
