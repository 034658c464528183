// y = LN(x) Wᵀ + b
#include "gemm.h"
#include "rows.h"

namespace prunevit {
namespace PRUNEVIT_ISA {
namespace {

struct NormLinearStep final : Step {
    explicit NormLinearStep(const NormLinear& op) : op(op) {}

    int64_t pitch() const { return round_up(op.linear->in, lanes) + lanes; }  // never a power of two

    Need need(int threads) const override {
        const int64_t rows = few_rows(op.x.rows, threads) ? op.x.rows : block_rows(row_blocks(op.x.rows, threads));
        const int64_t normed = rows * pitch(), part = rows * widest + round_up(op.x.cols, lanes);
        return few_rows(op.x.rows, threads) ? Need{part, normed} : Need{part + normed, 0};
    }

    void run(Pool& pool) const override {
        if (few_rows(op.x.rows, pool.threads()))
            by_columns(pool);
        else
            by_rows(pool);
    }

    void by_rows(Pool& pool) const {
        const RowBlocks blocks = row_blocks(op.x.rows, pool.threads());
        each(pool, blocks.count, [&](int block, float* scratch) {
            const int64_t first = block_start(blocks, block), last = block_start(blocks, block + 1);
            float* part = scratch + block_rows(blocks) * pitch();
            normalise_rows(op.x, first, last, op.eps, *op.linear, part, scratch, pitch());
            for (int p = 0; p < op.linear->panels; ++p)
                linear_panel(*op.linear, p, scratch, pitch(), (int)(last - first), Into::linear,
                             op.y.data + first * op.y.pitch + panel_column(*op.linear, p), op.y.pitch, part);
        });
    }

    void by_columns(Pool& pool) const {
        float* normed = pool.shared();
        each(pool, (int)op.x.rows, [&](int row, float* scratch) {
            normalise_rows(op.x, row, row + 1, op.eps, *op.linear, scratch, normed + row * pitch(), pitch());
        });
        each(pool, op.linear->panels, [&](int p, float* scratch) {
            linear_panel(*op.linear, p, normed, pitch(), (int)op.x.rows, Into::linear,
                         op.y.data + panel_column(*op.linear, p), op.y.pitch, scratch);
        });
    }

    const NormLinear op;
};

}  // namespace

Step* norm_linear(const NormLinear& op) { return new NormLinearStep(op); }

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
