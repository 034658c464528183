// x ← x + γ (act(LN(x) W1ᵀ + b1) W2ᵀ + b2), over blocks of rows whose hidden activations stay in the L2 cache
#include "gemm.h"
#include "rows.h"
#include "vmath.h"

namespace prunevit {
namespace PRUNEVIT_ISA {
namespace {

template <class F>
INLINE void map_tile(float* h, int64_t pitch, int rows, int cols, F function) {
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < cols; c += lanes) store(h + r * pitch + c, function(load(h + r * pitch + c)));
}

// cols is a whole number of vectors
void activate(Activation act, float* h, int64_t pitch, int rows, int cols) {
    switch (act) {
        case Activation::gelu: return map_tile(h, pitch, rows, cols, [](vf x) { return gelu(x); });
        case Activation::gelu_tanh: return map_tile(h, pitch, rows, cols, [](vf x) { return gelu_tanh(x); });
        case Activation::quick_gelu: return map_tile(h, pitch, rows, cols, [](vf x) { return quick_gelu(x); });
        case Activation::relu: return map_tile(h, pitch, rows, cols, [](vf x) { return relu(x); });
    }
}

struct FusedMlpStep final : Step {
    explicit FusedMlpStep(const FusedMlp& op) : op(op) {
        for (int b = 0; b < op.fc2->blocks; ++b) {
            const int columns = (int)round_up(op.fc2->k_start[b + 1] - op.fc2->k_start[b], lanes);
            if (columns > widest_chunk) widest_chunk = columns;
        }
    }

    int64_t in_pitch() const { return round_up(op.fc1->in, lanes) + lanes; }
    int64_t chunk_pitch() const { return widest_chunk + lanes; }
    int64_t hidden_pitch() const { return op.fc1->vectors * lanes + lanes; }
    int64_t out_pitch() const { return op.fc2->vectors * lanes + lanes; }

    Need need(int threads) const override {
        const int64_t rows = op.x.rows, row = round_up(op.x.cols, lanes);
        if (few_rows(rows, threads)) return {rows * widest + row, rows * (in_pitch() + hidden_pitch())};
        return {block_rows(row_blocks(rows, threads)) * (in_pitch() + chunk_pitch() + out_pitch() + widest) + row, 0};
    }

    void run(Pool& pool) const override {
        if (few_rows(op.x.rows, pool.threads()))
            by_columns(pool);
        else
            by_rows(pool);
    }

    void by_rows(Pool& pool) const {
        const RowBlocks blocks = row_blocks(op.x.rows, pool.threads());
        const int64_t most = block_rows(blocks);
        each(pool, blocks.count, [&](int block, float* scratch) {
            const int64_t first = block_start(blocks, block), last = block_start(blocks, block + 1);
            const int rows = (int)(last - first);
            float *normed = scratch, *hidden = normed + most * in_pitch(), *sums = hidden + most * chunk_pitch();
            float* part = sums + most * out_pitch();
            normalise_rows(op.x, first, last, op.eps, *op.fc1, part, normed, in_pitch());
            for (int chunk = 0; chunk < op.fc2->blocks; ++chunk) {
                hidden_chunk(chunk, normed, rows, hidden, part);
                add_chunk(chunk, hidden, rows, sums, op.x.data + first * op.x.pitch);
            }
        });
    }

    // hidden = act(fc1(normed)) for the columns of one block of fc2's k
    void hidden_chunk(int chunk, const float* normed, int rows, float* hidden, float* part) const {
        const int start = op.fc2->k_start[chunk], stop = op.fc2->k_start[chunk + 1];
        for (int p = start / (panel * lanes); p < op.fc1->panels && panel_column(*op.fc1, p) < stop; ++p) {
            hidden_panel(p, normed, rows, hidden + panel_column(*op.fc1, p) - start, chunk_pitch(), part);
        }
    }

    // to: where the panel's first column goes
    void hidden_panel(int p, const float* normed, int rows, float* to, int64_t pitch, float* part) const {
        Linear whole = *op.fc1;
        whole.out = whole.vectors * lanes;  // scratch takes whole vectors; what pads them is act(0) = 0 and never read
        linear_panel(whole, p, normed, in_pitch(), rows, Into::linear, to, pitch, part);
        activate(op.act, to, pitch, rows, panel_vectors(whole, p) * lanes);
    }

    void add_chunk(int chunk, const float* hidden, int rows, float* sums, float* x) const {
        const Linear& l = *op.fc2;
        for (int p = 0; p < l.panels; ++p)
            panel_block(l, chunk, p, hidden, chunk_pitch(), rows, Into::residual, residual_start(l, p, x), op.x.pitch,
                        sums + panel_column(l, p), out_pitch());
    }

    void by_columns(Pool& pool) const {
        const int rows = (int)op.x.rows;
        float *normed = pool.shared(), *hidden = normed + rows * in_pitch();
        each(pool, rows, [&](int row, float* scratch) {
            normalise_rows(op.x, row, row + 1, op.eps, *op.fc1, scratch, normed + row * in_pitch(), in_pitch());
        });
        each(pool, op.fc1->panels, [&](int p, float* scratch) {
            hidden_panel(p, normed, rows, hidden + panel_column(*op.fc1, p), hidden_pitch(), scratch);
        });
        each(pool, op.fc2->panels, [&](int p, float* scratch) {
            linear_panel(*op.fc2, p, hidden, hidden_pitch(), rows, Into::residual,
                         residual_start(*op.fc2, p, op.x.data), op.x.pitch, scratch);
        });
    }

    const FusedMlp op;
    int widest_chunk = 0;
};

}  // namespace

Step* fused_mlp(const FusedMlp& op) { return new FusedMlpStep(op); }

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
