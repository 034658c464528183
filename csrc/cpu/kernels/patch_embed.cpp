// Images into the residual stream: patches times weights, positions, prefix tokens, norms
#include "gemm.h"
#include "rows.h"

namespace prunevit {
namespace PRUNEVIT_ISA {
namespace {

struct PatchEmbedStep final : Step {
    explicit PatchEmbedStep(const PatchEmbed& op) : op(op) {}

    int64_t across() const { return op.width / op.patch_w; }
    int64_t patches() const { return across() * (op.height / op.patch_h); }
    int64_t pitch() const { return round_up(op.linear->in, lanes) + lanes; }
    bool few(int threads) const { return few_rows(op.batch * patches(), threads); }

    Need need(int threads) const override {
        const int64_t rows = op.batch * patches();
        if (few(threads)) return {rows * widest, rows * pitch()};
        return {block_rows(row_blocks(rows, threads)) * (pitch() + widest), 0};
    }

    void run(Pool& pool) const override {
        const int64_t rows = op.batch * patches();
        if (few(pool.threads())) {
            float* cut = pool.shared();
            each(pool, (int)rows, [&](int row, float*) { cut_patch(row, cut + row * pitch()); });
            each(pool, op.linear->panels, [&](int p, float* scratch) { multiply(p, cut, 0, rows, scratch); });
        } else {
            const RowBlocks blocks = row_blocks(rows, pool.threads());
            each(pool, blocks.count, [&](int block, float* scratch) {
                const int64_t first = block_start(blocks, block), last = block_start(blocks, block + 1);
                for (int64_t r = first; r < last; ++r) cut_patch(r, scratch + (r - first) * pitch());
                for (int p = 0; p < op.linear->panels; ++p)
                    multiply(p, scratch, first, last, scratch + block_rows(blocks) * pitch());
            });
        }
        each(pool, (int)(op.batch * op.x.rows), [&](int row, float*) { finish(row); });
    }

    // One patch as a row of [channels, patch_h, patch_w].
    void cut_patch(int64_t row, float* to) const {
        const int64_t patch = row % patches();
        const float* from = op.images + row / patches() * op.channels * op.height * op.width +
                            patch / across() * op.patch_h * op.width + patch % across() * op.patch_w;
        for (int64_t c = 0; c < op.channels; ++c)
            for (int64_t y = 0; y < op.patch_h; ++y, to += op.patch_w)
                memcpy(to, from + (c * op.height + y) * op.width, op.patch_w * sizeof(float));
    }

    // Panel p of patches [first, last), image by image: prefix tokens lie between the rows of two images.
    void multiply(int p, const float* cut, int64_t first, int64_t last, float* part) const {
        while (first < last) {
            const int64_t image = first / patches(),
                          stop = (image + 1) * patches() < last ? (image + 1) * patches() : last;
            float* to = op.x.data + image * op.x.image + (op.prefix_count + first % patches()) * op.x.pitch;
            linear_panel(*op.linear, p, cut, pitch(), (int)(stop - first), Into::linear,
                         to + panel_column(*op.linear, p), op.x.pitch, part);
            cut += (stop - first) * pitch();
            first = stop;
        }
    }

    void finish(int64_t row) const {
        const int width = (int)op.x.cols;
        const int64_t token = row % op.x.rows, patch = token - op.prefix_count;
        float* x = op.x.data + row / op.x.rows * op.x.image + token * op.x.pitch;
        if (patch < 0) {
            memcpy(x, op.prefix + token * width, width * sizeof(float));
        } else {
            if (op.embed_norm != nullptr) normalise_affine(x, width, op.eps, op.embed_norm, x);
            for (int i = 0; i < width; ++i) x[i] += op.positions[patch * width + i];
        }
        if (op.pre_norm != nullptr) normalise_affine(x, width, op.eps, op.pre_norm, x);
    }

    const PatchEmbed op;
};

}  // namespace

Step* patch_embed(const PatchEmbed& op) { return new PatchEmbedStep(op); }

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
