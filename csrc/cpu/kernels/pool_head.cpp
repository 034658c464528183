// Tokens to logits: norm, pool, norm, linear
#include "gemm.h"
#include "rows.h"

namespace prunevit {
namespace PRUNEVIT_ISA {
namespace {

struct PoolHeadStep final : Step {
    explicit PoolHeadStep(const PoolHead& op) : op(op) {}

    int width() const { return (int)op.x.cols; }
    int64_t pooled_rows() const { return op.out.rows; }
    int64_t pooled_width() const { return op.pooling == Pooling::tokens ? 2 * op.x.cols : op.x.cols; }
    int64_t pitch() const { return round_up(pooled_width(), lanes) + lanes; }

    RowBlocks blocks(int threads) const {
        return few_rows(pooled_rows(), threads) ? RowBlocks{pooled_rows(), 1} : row_blocks(pooled_rows(), threads);
    }

    Need need(int threads) const override {
        const int64_t part = block_rows(blocks(threads)) * widest, rows = 4 * round_up(op.x.cols, lanes);
        return {part > rows ? part : rows, pooled_rows() * pitch()};
    }

    void run(Pool& pool) const override {
        float* pooled = op.linear == nullptr ? op.out.data : pool.shared();
        const int64_t row_pitch = op.linear == nullptr ? op.out.pitch : pitch();
        each(pool, (int)pooled_rows(),
             [&](int row, float* scratch) { pool_row(row, pooled + row * row_pitch, scratch); });
        if (op.linear == nullptr) return;
        const RowBlocks rows = blocks(pool.threads());
        each(pool, op.linear->panels * rows.count, [&](int item, float* scratch) {
            const int p = item / rows.count, block = item % rows.count;
            const int64_t first = block_start(rows, block), last = block_start(rows, block + 1);
            linear_panel(*op.linear, p, pooled + first * row_pitch, row_pitch, (int)(last - first), Into::linear,
                         op.out.data + first * op.out.pitch + panel_column(*op.linear, p), op.out.pitch, scratch);
        });
    }

    void token(int64_t image, int64_t n, float* to) const {
        const float* from = op.x.data + image * op.x.image + n * op.x.pitch;
        if (op.norm != nullptr)
            normalise_affine(from, width(), op.eps, op.norm, to);
        else
            memcpy(to, from, width() * sizeof(float));
    }

    void pool_row(int64_t row, float* to, float* scratch) const {
        switch (op.pooling) {
            case Pooling::token: token(row, 0, to); break;
            case Pooling::tokens:
                token(row, 0, to);
                token(row, 1, to + width());
                break;
            case Pooling::none: token(row / op.x.rows, row % op.x.rows, to); break;
            case Pooling::avg:
            case Pooling::max:
            case Pooling::avgmax: pool_patches(row, to, scratch);
        }
        if (op.fc_norm != nullptr) normalise_affine(to, width(), op.eps, op.fc_norm, to);
    }

    void pool_patches(int64_t image, float* to, float* scratch) const {
        const int e = width();
        const int64_t row = round_up(e, lanes), together = 16;  // short chains of sums keep the rounding error small
        float *one = scratch, *part = one + row, *sum = part + row, *most = sum + row;
        memset(sum, 0, e * sizeof(float));
        for (int64_t n = op.prefix; n < op.x.rows; ++n) {
            const bool first = (n - op.prefix) % together == 0, last = (n - op.prefix + 1) % together == 0;
            token(image, n, one);
            for (int i = 0; i < e; ++i) {
                part[i] = first ? one[i] : part[i] + one[i];
                most[i] = n == op.prefix || one[i] > most[i] || one[i] != one[i] ? one[i] : most[i];
            }
            if (last || n + 1 == op.x.rows)
                for (int i = 0; i < e; ++i) sum[i] += part[i];
        }
        const float share = 1.0f / (float)(op.x.rows - op.prefix);
        for (int i = 0; i < e; ++i) {
            const float mean = sum[i] * share;
            to[i] = op.pooling == Pooling::avg ? mean : op.pooling == Pooling::max ? most[i] : 0.5f * (most[i] + mean);
        }
    }

    const PoolHead op;
};

}  // namespace

Step* pool_head(const PoolHead& op) { return new PoolHeadStep(op); }

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
