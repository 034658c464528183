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
      for (int panel = p; panel < (few ? p + 1 : op.linear->panels); ++panel)
        linear_panel(*op.linear, panel, op.c.data + first * op.c.pitch, op.c.pitch, (int)(last - first),
                     Into::residual, residual_start(*op.linear, panel, op.x.data + first * op.x.pitch), op.x.pitch, scratch);
    });
  }

  const LinearResidual op;
};

}  // namespace

Step* linear_residual(const LinearResidual& op) { return new LinearResidualStep(op); }

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
